"""What `precision="fast"` changes, without a GPU: `python -m benchmarks.search.fast_precision`.

The CUDA kernels run on the CPU (tests/kernels/emulation), halves and their products exactly as a
tensor core has them, sums in float32, on the trained heads of heads.py; N = 4, T = 5. gpu.py asks
the same of a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.search.heads import trained_head
from tests.kernels.emulation import emulated

CASES = [(80, True, 4000), (80, False, 4000), (1000, False, 1000)]  # L, chain term, images


def main() -> None:
    """Print a line per head."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = emulated.build(Path(folder))
    for num_labels, chain_term, count in CASES:
        trained = trained_head(num_labels, chain_term)
        with torch.no_grad():
            images = trained.head.embed(trained.features(slice(count)))
        head = emulated.EmulatedHead(library, trained.head, prefix_bytes=1 << 29)
        options = (images.joint, images.label_logits, 4, 5, 0, "increasing", False, "n_best", False)
        exact, fast = (head.beam_search(*options, precision=p) for p in ("exact", "fast"))
        changed = (exact[0][:, 0] != fast[0][:, 0]).any(1)
        apart = (exact[2][:, 0] - fast[2][:, 0]).abs()
        lead = (exact[2][:, 0] - exact[2][:, 1])[changed]
        print(
            f"{num_labels} labels, {'chain term' if chain_term else 'no chain term'}: "
            f"{int(changed.sum())} of {count} best paths changed, which led the second by at most "
            f"{float(lead.max()) if len(lead) else 0:.4f}; log-probabilities differ by at most "
            f"{float(apart.max()):.4f}, on average {float(apart.mean()):.5f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
