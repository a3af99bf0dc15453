"""Ensembles: heads of different label orders and seeds, searched each by itself and averaged.

Letters: B images, M members, C candidate label sets of an image, L labels, T the longest path.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn
from torch.nn import functional

from cnnrnn.config import Calibration, SearchConfig, SearchDevice
from cnnrnn.data.files import reason, short
from cnnrnn.labels import PAD, check_evidence, forbidden_labels, increasing_paths, path_sets
from cnnrnn.machine.files import weights_digest
from cnnrnn.model.checkpoint import (
    CONFIG_FILE,
    FEATURES_ONLY,
    FORMAT,
    CheckpointError,
    find_checkpoint,
    is_checkpoint,
    read_calibration,
    read_description,
    replace_folder,
    require_format,
    require_one_per_label,
    typed,
    write_description,
)
from cnnrnn.model.classifier import CNNRNN, load_checkpoint
from cnnrnn.model.shipped import SHIPPED, load_shipped
from cnnrnn.network.head import Head, ImageEmbedding
from cnnrnn.prediction.decisions import calibrate
from cnnrnn.prediction.predictor import TorchPredictor
from cnnrnn.search import SearchResult
from cnnrnn.search.checks import resolve_max_labels
from cnnrnn.search.inference import SEARCH_BATCH, Inference, of_all

SCORES_AT_ONCE = 1 << 24  # label scores held while sets are scored: 64 MB


@torch.no_grad()
def set_log_probs(
    head: Head, embedding: ImageEmbedding, sets: Tensor, search: SearchConfig | None = None
) -> Tensor:
    """Return the log-probability that a head gives to label sets, with teacher forcing.

    A set has one path under the order `increasing`, so this is what the search reports for it.

    Args:
        head: in eval mode.
        embedding: of B images.
        sets: [B, L] bool, one label set per image, columns in the head's path order.
        search: as in the search, a path of `max_labels` labels ends for certain, longer ones are
            impossible, and shorter ones than `min_labels` end only where nothing else may follow.
            None for the search's defaults.

    Returns:
        [B] log-probabilities, -inf for an impossible set.

    Raises:
        ValueError: another search order, or shapes that do not fit.
    """
    search = search or SearchConfig()
    if search.order != "increasing":
        raise ValueError(f"search.order must be increasing to score sets, got {search.order}")
    B, L = len(embedding), head.num_labels
    if sets.shape != (B, L):
        raise ValueError(f"sets must be [{B}, {L}], got {list(sets.shape)}")
    longest = resolve_max_labels(head, search)
    paths = increasing_paths(sets & (sets.sum(1) <= longest)[:, None])
    steps = torch.arange(paths.shape[1] + 1, device=paths.device)
    result = paths.new_empty(B, dtype=torch.float64)
    size = max(1, SCORES_AT_ONCE // (len(steps) * (L + 1)))
    for part in torch.arange(B, device=paths.device).split(size):
        path = paths[part]
        lengths = (path != PAD).sum(1, keepdim=True)
        forbidden = forbidden_labels(path, L, "increasing")
        at_last_label = functional.pad(path, (1, 0), value=PAD) == L - 1
        forbidden[:, :, L] = (steps < search.min_labels) & ~at_last_label
        scores = head.score_paths(embedding.of(part), path).masked_fill(forbidden, -torch.inf)
        following = functional.pad(path, (0, 1), value=PAD)
        following = following.masked_fill(following == PAD, L)
        log_probs = scores.log_softmax(2).gather(2, following[:, :, None])[:, :, 0]
        certain = (steps > lengths) | (steps == longest)
        result[part] = log_probs.double().clamp(max=0).masked_fill(certain, 0).sum(1)
    return result.masked_fill(sets.sum(1) > longest, -torch.inf).to(embedding.joint.dtype)


def mixture_log_probs(members: Sequence[Tensor]) -> Tensor:
    """Return the log of the mean probability that members [n] give to each of n sets."""
    return torch.stack(list(members)).logsumexp(0) - math.log(len(members))


class Ensemble(nn.Module, TorchPredictor):
    """Several trained heads over one frozen backbone, or over feature vectors, as one model.

    Scores are the mean of the members' mixed marginals. The best path is that of the label set,
    among those of all paths that a member's search returns, to which the members give the largest
    mean log-probability.

    Args:
        models: M models with the same label names, in path orders of their own. One of those that
            have a backbone serves all; its weights must be the same in the others.
        calibration: thresholds and k; the means of the members' by default, with the smallest of
            their `min_labels`, and what is uncalibrated in any of them. Each member mixes with its
            own weight.

    Attributes:
        members: the M models, without their backbones.
        backbone: the image network; None for feature vectors.
        search: the first member's, which all members run.
        calibration: what the validation split decided.

    Raises:
        ValueError: there is no model, or the models do not fit together.
    """

    members: nn.ModuleList

    def __init__(self, models: Sequence[CNNRNN], calibration: Calibration | None = None) -> None:
        super().__init__()
        _require_one_kind(models)
        self.backbone = next((m.backbone for m in models if m.backbone is not None), None)
        self.members = nn.ModuleList(
            CNNRNN(m.config, m.label_space, m.head, None, m.search, m.calibration) for m in models
        )
        self.search = models[0].search
        self.calibration = calibration or self._mean_calibration()

    @property
    def models(self) -> list[CNNRNN]:
        """The members as a typed list."""
        return [member for member in self.members if isinstance(member, CNNRNN)]

    @property
    def labels(self) -> tuple[str, ...]:
        """Label names in the path order of the first member, [L]."""
        return self.models[0].labels

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.models[0].device

    @property
    def feature_dim(self) -> int:
        """F, the width of the feature vectors that the heads read."""
        return self.models[0].feature_dim

    @torch.no_grad()
    def infer(
        self,
        features: Tensor,
        search: SearchConfig | None = None,
        evidence: Tensor | None = None,
        search_device: SearchDevice = "auto",
    ) -> Inference:
        """Search feature vectors [n, F] with every member; the ensemble's own search by default.

        Args:
            features: [n, F].
            search: the options of the members' searches.
            evidence: [1 or n, L] int8, columns in the order of `labels`; see `beam_search`.
            search_device: where every member searches, see `beam_search`.

        Returns:
            Sets, mean scores (as marginals, with nothing left to mix in) and paths, on the CPU, in
            the order of `labels`.

        Raises:
            NonFiniteError: for feature vectors that give values that are not finite.
        """
        search = search or self.search
        if evidence is not None:
            check_evidence(evidence, len(features), len(self.labels), self.longest_path(search))
        found = [
            model.infer(
                features,
                search,
                None if evidence is None else evidence[:, self._columns(model).argsort()],
                search_device,
            )
            for model in self.models
        ]
        scores = [
            inference.mixed(model.calibration)[:, self._columns(model)]
            for model, inference in zip(self.models, found, strict=True)
        ]
        results = tuple(
            self._joined(part, [inference.search[i] for inference in found], search)
            for i, part in enumerate(features.split(SEARCH_BATCH) if len(features) else ())
        )
        no_sets = torch.zeros(0, len(self.labels), dtype=torch.bool)
        sets = torch.cat([no_sets, *(result.best_sets().cpu() for result in results)])
        return Inference(sets, torch.stack(scores).mean(0), None, results, of_all(evidence, sets))

    def longest_path(self, search: SearchConfig) -> int:
        """Return how many labels a path of a search can hold: in every member."""
        return min(model.longest_path(search) for model in self.models)

    def calibrate(
        self,
        features: Tensor,
        targets: Tensor,
        trained: Tensor | None = None,
        unknown: Tensor | None = None,
    ) -> None:
        """Choose thresholds and k on validation data.

        Args:
            features: [n, F].
            targets: [n, L] bool, columns in the order of `labels`.
            trained: [L] bool, labels that occur in training; all of them without.
            unknown: [n, L] bool, labels that are neither present nor absent.
        """
        inference = self.infer(features.to(self.device))
        self.calibration = calibrate(inference, targets, trained, unknown=unknown)

    def set_nll(self, features: Tensor, targets: Tensor) -> Tensor:
        """Return -log of the members' mean probability of the whole true set, in nats.

        Args:
            features: [n, F].
            targets: [n, L] bool, columns in the order of `labels`.

        Returns:
            [n] float64.
        """
        return -mixture_log_probs([
            -model.set_nll(features, targets[:, self._columns(model).argsort()])
            for model in self.models
        ])  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write a folder of members, whole or not at all.

        Each member is a checkpoint folder by itself; the first one holds the backbone.

        Args:
            path: the folder; a former checkpoint there is replaced.
        """
        replace_folder(path, self._write)

    def _write(self, folder: Path) -> None:
        names = [f"members/{i}" for i in range(len(self.members))]
        for i, (name, m) in enumerate(zip(names, self.models, strict=True)):
            (folder / name).mkdir(parents=True)
            backbone = None if i else self.backbone
            CNNRNN(m.config, m.label_space, m.head, backbone, m.search, m.calibration).write(
                folder / name
            )
        calibration = asdict(self.calibration)
        write_description(folder, {"format": FORMAT, "members": names, "calibration": calibration})

    def _mean_calibration(self) -> Calibration:
        found = [model.calibration for model in self.models]
        mean = Calibration(
            threshold=sum(c.threshold for c in found) / len(found),
            mix_weight=0.0,
            k=round(sum(c.k for c in found) / len(found)),
            min_labels=min(c.min_labels for c in found),
        )
        if not all(c.label_thresholds for c in found):
            return mean
        cuts = torch.stack([
            torch.tensor(c.label_thresholds, dtype=torch.float64)[self._columns(model)]
            for c, model in zip(found, self.models, strict=True)
        ])  # fmt: skip
        few = {m.labels[i] for m in self.models for i in m.calibration.uncalibrated}
        return replace(
            mean,
            label_thresholds=tuple(cuts.mean(0).tolist()),
            uncalibrated=tuple(i for i, name in enumerate(self.labels) if name in few),
        )

    def _columns(self, model: CNNRNN) -> Tensor:
        """Return which of a member's labels each of `labels` is: [L] int64 on the CPU."""
        position = {name: i for i, name in enumerate(model.labels)}
        return torch.tensor([position[name] for name in self.labels])

    def _joined(
        self, features: Tensor, results: list[SearchResult], search: SearchConfig
    ) -> SearchResult:
        """Rank the members' label sets of B images by their mean log-probability."""
        B, L = len(features), len(self.labels)
        device = features.device
        columns = [self._columns(model).to(device) for model in self.models]
        longest = max(result.labels.shape[2] for result in results)
        candidates, absent = [], []
        for own_columns, result in zip(columns, results, strict=True):
            # Ascending in the order of `labels`; what is past the end is L, which sorts last.
            names = torch.cat([own_columns.argsort(), own_columns.new_tensor([L])])
            labels = names[result.labels.to(device)].sort(2).values
            candidates.append(functional.pad(labels, (0, longest - labels.shape[2]), value=L))
            absent.append(result.log_probs.to(device) == -torch.inf)
        paths, gone = torch.cat(candidates, 1), torch.cat(absent, 1)  # [B, C, T] and [B, C]
        same = (paths[:, :, None] == paths[:, None]).all(3) & ~gone[:, None]
        gone = gone | same.tril(-1).any(2)
        image, candidate = (~gone).nonzero(as_tuple=True)
        paths = paths.masked_fill(paths == L, PAD)
        sets = path_sets(paths[image, candidate], L)
        log_probs = torch.zeros(len(sets), dtype=torch.float64, device=device)
        for model, own_columns in zip(self.models, columns, strict=True):
            of_image = model.head.embed(features).of(image)
            own = set_log_probs(model.head, of_image, sets[:, own_columns.argsort()], search)
            log_probs += own / len(self.members)
        ranked = log_probs.new_full(gone.shape, -torch.inf)
        ranked[image, candidate] = log_probs
        kept = max(1, int((~gone).sum(1).max())) if B else 0
        # A set that is impossible for one member still stands before what is gone.
        order = ranked.clamp(min=-1e300).masked_fill(gone, -torch.inf)
        best = order.argsort(dim=1, descending=True, stable=True)[:, :kept]
        paths = paths.masked_fill(gone[:, :, None], PAD)
        paths = paths.gather(1, best[:, :, None].expand(B, kept, longest))
        return SearchResult(
            paths, (paths != PAD).sum(2), ranked.gather(1, best).to(features.dtype), L
        )


def _require_one_kind(models: Sequence[CNNRNN]) -> None:
    if not models:
        raise ValueError("an ensemble must have at least 1 model, got 0")
    first = models[0]
    digests, forms = set(), set()
    for i, model in enumerate(models):
        if model.config.backbone != FEATURES_ONLY and not model.config.freeze_backbone:
            raise ValueError(f"the backbone of member {i} must be frozen to be shared, got trained")
        if model.search.order != "increasing":
            raise ValueError(
                f"search.order of member {i} must be increasing, so that a label set has one path, "
                f"got {model.search.order}"
            )
        for name, got, expected in (
            ("backbone", model.config.backbone, first.config.backbone),
            ("feature_dim", model.feature_dim, first.feature_dim),
        ):
            if got != expected:
                raise ValueError(
                    f"{name} of member {i} must match member 0 ({expected}), got {got}"
                )
        if set(model.labels) != set(first.labels):
            odd = sorted(set(model.labels) ^ set(first.labels))
            raise ValueError(
                f"labels of member {i} must be the {len(first.labels)} of member 0, got others: "
                f"{odd[:5]}"
            )
        if model.backbone is not None:
            digests.add(weights_digest(model.backbone.state_dict().items()))
            forms.add(model.backbone.preprocessing)
    if len(forms) > 1:
        raise ValueError(
            f"the members must share one preprocessing, got {' and '.join(sorted(map(str, forms)))}"
        )
    if len(digests) > 1:
        raise ValueError(f"the members must share one backbone, got {len(digests)} different ones")


def load_model(path: str | Path) -> CNNRNN | Ensemble:
    """Read the folder of a model or of an ensemble, or the best one of a training run's folder.

    Args:
        path: a folder written by `CNNRNN.save` or `Ensemble.save`, or one that holds such a folder
            as `best`; or where there is no such folder, the name of a model of the package.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        CheckpointError: the folder is missing or incomplete, or its parts do not fit together.
        ModuleNotFoundError: a model of the package needs an extra that is not installed.
    """
    if str(path) in SHIPPED and not is_checkpoint(path):
        return load_shipped(str(path))
    folder = find_checkpoint(path)
    file = folder / CONFIG_FILE
    description = read_description(file)
    if not isinstance(description, dict) or "members" not in description:
        return load_checkpoint(folder)
    require_format(file, description.get("format"))
    try:
        names = typed("members", description["members"], list[str])
        for name in names:
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts or not parts.parts:
                raise ValueError(f"members must be folders below this one, got {short(name)}")
        if len({PurePosixPath(name) for name in names}) != len(names):
            raise ValueError("members must be different folders")
        calibration = read_calibration(description.get("calibration"), description["format"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{file} does not describe an ensemble: {reason(error)}") from error
    models = [load_checkpoint(folder / name) for name in names]
    try:
        ensemble = Ensemble(models, calibration)
        require_one_per_label(calibration, len(ensemble.labels))
        return ensemble.eval()
    except ValueError as error:
        raise CheckpointError(
            f"{file} names members that do not fit together: {reason(error)}"
        ) from error
