"""The compiled beam search; csrc/bindings.cpp defines it."""

from torch import Tensor, device

MAX_BEAM_SIZE: int
MAX_CUDA_PATHS: int
WITH_CUDA: bool  # whether this build has CudaHead

class _PackedHead:  # the class is for this file alone
    def beam_search(
        self,
        joint: Tensor,  # [B, D]
        label_logits: Tensor | None,  # [B, L+1]
        beam_size: int,
        max_labels: int,
        min_labels: int,
        order: str,
        end_takes_slot: bool,
        stop: str,
        marginals: bool,
        trace: bool = False,
        precision: str = "exact",  # of label scores on a GPU
        rounds: int = -1,  # of making states, of a captured search: -1 as many as it can need
        evidence: Tensor | None = None,  # [1 or B, L] int8: 1 present, -1 absent, 0 unknown
        marginal_places: int = 0,  # live paths of a bank in a search for marginals; 0: beam_size
    ) -> tuple[
        Tensor,  # labels [B, N, T]
        Tensor,  # lengths [B, N]
        Tensor,  # log_probs [B, N]
        Tensor | None,  # marginals [B, L]
        Tensor | None,  # trace [B, T+1, W, 2]: parent rank and label of each step's live paths
        tuple[int, int, int, int, int],  # the fields of SearchStats
        int,  # images that were marked
        Tensor | None,  # log_evidence [B], with marginals
    ]: ...

class CpuHead(_PackedHead):
    """A head's weights packed for the CPU search, and its kept prefix states."""

    def __init__(
        self,
        label_embedding: Tensor,  # [L+2, D]
        input_embedding: Tensor | None,  # [L+2, D]; None: label_embedding
        score_bias: Tensor | None,  # [L+1]
        input_weight: Tensor,  # [4H, D]
        hidden_weight: Tensor,  # [4H, H]
        input_bias: Tensor | None,  # [4H]
        hidden_bias: Tensor | None,  # [4H]
        output_projection: Tensor,  # [D, H]
        *,
        cell: str,
        activation: str,
        prefix_bytes: int = ...,
        instruction_set: str = "auto",
    ) -> None: ...
    def best_sets(
        self,
        joint: Tensor,  # [B, D]
        label_logits: Tensor | None,  # [B, L+1]
        count: int,  # K
        max_labels: int,  # T
        min_labels: int,
        least: float,  # sets of a lower log-probability are not wanted
        max_expansions: int,
        evidence: Tensor | None = None,  # [1 or B, L] int8
    ) -> tuple[
        Tensor,  # labels [B, K, T]
        Tensor,  # lengths [B, K]
        Tensor,  # log_probs [B, K]
        Tensor,  # proved [B]: the first so many are the most probable sets
        Tensor,  # ended [B] bool: no other set that is wanted is left
        Tensor,  # expansions [B]
        tuple[int, int, int, int, int],  # the fields of SearchStats
        int,  # images that were marked
    ]: ...

class CudaHead(_PackedHead):
    """A head's weights packed on its GPU, and its kept prefix states."""

    def __init__(
        self,
        label_embedding: Tensor,  # [L+2, D]
        input_embedding: Tensor | None,  # [L+2, D]; None: label_embedding
        score_bias: Tensor | None,  # [L+1]
        input_weight: Tensor,  # [4H, D]
        hidden_weight: Tensor,  # [4H, H]
        input_bias: Tensor | None,  # [4H]
        hidden_bias: Tensor | None,  # [4H]
        output_projection: Tensor,  # [D, H]
        *,
        cell: str,
        activation: str,
        prefix_bytes: int = ...,
    ) -> None: ...

def packed_head(
    owner: int,
    device: device,  # that searches
    cell: str,
    activation: str,
    cache_generation: int,
    prefix_bytes: int,
    label_embedding: Tensor,  # this and the others as in CpuHead, of any type, on any device
    input_embedding: Tensor | None,
    score_bias: Tensor | None,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor | None,
    hidden_bias: Tensor | None,
    output_projection: Tensor,
    /,
) -> CpuHead | CudaHead: ...
def forget_head(owner: int, /) -> int: ...  # of how many devices something was kept
def instruction_sets() -> list[str]: ...
