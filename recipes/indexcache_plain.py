"""Index sharing without an indexer: a plain multi-head transformer learns the same tasks, then its layers choose by an
oracle, the keys to which each attends most, and share what they chose.

python recipes/indexcache_plain.py --text NOVELS --out runs/plain
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from nanoglm.indexcache.calibration import HOPS, of_tasks
from nanoglm.indexcache.evaluate import Evaluator
from nanoglm.indexcache.overlap import merged, overlap
from nanoglm.indexcache.plain import Transformer, oracle
from nanoglm.indexcache.search import Search
from nanoglm.tasks import VOCABULARY
from nanoglm.train.data import IGNORE
from nanoglm.train.recall import Recall
from nanoglm.train.run import corpus

WIDTH, HEADS, LAYERS, TOPK = 96, 4, 12, 32
STAGES = ((0.1, 16), (0.1, 32), (0.4, 64), (0.15, 128), (0.25, 512))  # share of the steps, tokens of a sequence
TOKENS = 1024  # a step


def train(model: Transformer, source: Recall, steps: int, rate: float) -> None:
    """Dense next-token training through the lengths."""
    mover = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    done = 0
    for share, length in STAGES:
        for _ in range(round(share * steps)):
            for group in mover.param_groups:
                group["lr"] = rate * min(1.0, (done + 1) / 50) * (1 - 0.9 * done / steps)
            sample = source.take(length, TOKENS // length)
            loss = F.cross_entropy(model(sample.ids, sample.batch), sample.targets, ignore_index=IGNORE)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            mover.step()
            mover.zero_grad()
            if done % 50 == 0:
                print(f"step {done} length {length} loss {float(loss):.4f}", flush=True)
            done += 1


def main(text: Path, out: Path, steps: int = 2400, rate: float = 2e-3, hops: float = 0.7, seed: int = 0) -> None:
    """Trains the model, or takes the one in ``out``; then dense, oracle, overlap and search.

    Args:
        text: A UTF-8 file or a folder of .txt files, filler of needles.
        out: A folder for weights and table.
        steps: Of training.
        rate: Of AdamW, at its peak.
        hops: Share of chains among the tasks.
        seed: Of weights and data.
    """
    model, file = Transformer(VOCABULARY, WIDTH, HEADS, LAYERS).initialise(seed, shared=0.06), out / "model.pt"
    out.mkdir(parents=True, exist_ok=True)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        data = corpus(text).text
        assert data is not None
        train(model, Recall(data, seed, skip=False, hops=hops), steps, rate)
        torch.save(model.state_dict(), file)
    tasks = of_tasks(("recall", *HOPS), 512, 64, seed=1)
    model.eval()
    dense = Evaluator(model, tasks).scores([model.pattern])[model.pattern]
    lines = ["| way | indexers | pattern | nats a token | right |", "| --- | --- | --- | --- | --- |"]
    lines.append(f"| dense | | | {dense.loss.mean():.4f} | {dense.right.mean():.1%} |")
    search = Search(Evaluator(model.selecting(oracle(TOPK), TOPK), tasks))
    band = merged(overlap(model, tasks), 4 * TOPK)
    greedy = [row for row in search.greedy(3) if row.full in (12, 6, 4, 3)]
    for row in [*greedy, search.exhaustive(3), *search.uniform(3), search.alike("overlap", band.overlap, 3)]:
        right = " ".join(f"{group} {share:.1%}" for group, share in row.right.items())
        lines.append(f"| {row.method} | {row.full} | {row.pattern} | {row.loss:.4f} | {right} |")
    off = ~torch.eye(LAYERS, dtype=torch.bool)
    lines.append("")
    lines.append(
        f"Overlap less chance ({band.chance:.2f}) from position {band.begin} on: neighbours "
        f"{float(band.corrected.diagonal(1).mean()):.2f}, all pairs {float(band.corrected[off].mean()):.2f}."
    )
    (out / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    tyro.cli(main)
