"""The compiled beam search; csrc/bindings.cpp defines it."""

from torch import Tensor

MAX_BEAM_SIZE: int
WITH_CUDA: bool  # whether this build has CudaHead

class CpuHead:
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
    ) -> tuple[
        Tensor,  # labels [B, N, T]
        Tensor,  # lengths [B, N]
        Tensor,  # log_probs [B, N]
        Tensor | None,  # marginals [B, L]
        Tensor | None,  # trace [B, T+1, N, 2]: parent rank and label of each step's live paths
        tuple[int, int, int, int, int],  # the fields of SearchStats
        int,  # images that were marked
    ]: ...

class CudaHead:
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
    ) -> tuple[
        Tensor,  # labels [B, N, T]
        Tensor,  # lengths [B, N]
        Tensor,  # log_probs [B, N]
        Tensor | None,  # marginals [B, L]
        Tensor | None,  # trace [B, T+1, N, 2]: parent rank and label of each step's live paths
        tuple[int, int, int, int, int],  # the fields of SearchStats
        int,  # images that were marked
    ]: ...

def instruction_sets() -> list[str]: ...
