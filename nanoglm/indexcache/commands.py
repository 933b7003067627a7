"""``nanoglm indexcache ...``: the verbs. What training and plots need is imported when they run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from tyro.conf import Positional, subcommand

from nanoglm.api import Model, checkpoint_directory, load
from nanoglm.chat.tokenizer import byte_tokenizer
from nanoglm.errors import InputError
from nanoglm.eval.perplexity import all_full as all_full_of
from nanoglm.indexcache.apply import apply, launch_lines
from nanoglm.indexcache.calibration import HOPS, Calibration, of_tasks, of_text
from nanoglm.indexcache.evaluate import Evaluator, Score, check
from nanoglm.indexcache.gates import gates
from nanoglm.indexcache.overlap import merged, overlap, similarity
from nanoglm.indexcache.pattern import count_of
from nanoglm.indexcache.search import Method, Row, Search, cost, read_scores
from nanoglm.indexcache.stack import GLMStack
from nanoglm.memory import parse_bytes
from nanoglm.tasks import VOCABULARY
from nanoglm.weights import SHARED_INDEXERS

SETTINGS, EVALUATIONS, RESULT, OVERLAP = "settings.json", "evaluations.jsonl", "result.json", "overlap.json"
DEFAULT = str(Path(__file__).parents[1] / "assets" / "indexcache")  # recipes/indexcache.py trained it
ModelName = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Scored:
    """The sequences on which models are compared.

    Attributes:
        data: A UTF-8 text, of which windows are taken.
        tasks: Instead of a text, tasks of long context (nanoglm/tasks.py), 2hop to 4hop chains of one length; if
            neither is given, recall 2hop 3hop 4hop.
        length: Tokens of a sequence, some times k.
        sequences: How many.
        seed: Of the tasks' sequences and of patterns that are drawn.
        held_out: The text's other windows: none overlaps those that are taken without it.
    """

    data: Path | None = None
    tasks: tuple[str, ...] = ()
    length: int = 512
    sequences: int = 64
    seed: int = 0
    held_out: bool = False

    def of(self, model: Model) -> Calibration:
        """The sequences in the model's tokens.

        Raises:
            InputError: both a text and tasks, tasks for a model with another vocabulary than theirs, no such text;
                other windows of tasks, which another seed gives.
        """
        length, sequences = self.length, self.sequences
        if self.data is not None and self.tasks:
            raise InputError("data and tasks are both given; expected one of them")
        if min(length, sequences) < 2:
            raise InputError(f"length is {length} and sequences {sequences}; expected at least 2")
        size = model.config.vocab_size
        if self.data is None:
            if self.held_out:
                raise InputError("held_out is given without data; expected another seed for other sequences of tasks")
            if size != VOCABULARY:
                raise InputError(f"model has vocabulary {size}; expected the tasks' {VOCABULARY}, or --data TEXT")
            return of_tasks(self.tasks or ("recall", *HOPS), length, sequences, self.seed)
        try:
            text = self.data.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"data {self.data} cannot be read as UTF-8: {error}") from None
        tokenizer = model.tokenizer if model.has_tokenizer or size != VOCABULARY else byte_tokenizer()
        return of_text(np.array(tokenizer.encode(text)), length, sequences, skip=int(self.held_out))


def overlap_(
    model: ModelName = DEFAULT,
    /,
    scored: Annotated[Scored, tyro.conf.arg(name="")] = Scored(),  # noqa: B008
    all_full: bool = False,
    out: Path | None = None,
) -> None:
    """How much the layers' Selections have in common, corrected for chance, by range of positions.

    Args:
        model: A checkpoint directory; the twelve-layer one that comes with nanoglm if left out.
        scored: The sequences.
        all_full: With indexers in every layer, those of Shared layers from the file that training left beside.
        out: A folder for the figures, which nanoglm indexcache report draws.
    """
    loaded = _loaded(model, all_full)
    stack = GLMStack(loaded.module)
    bands = overlap(stack, scored.of(loaded))
    table = Table("positions", "queries", "chance", "neighbours", "all pairs", "least", "corrected: neighbours", "all")
    n = len(stack.pattern)
    off = ~torch.eye(n, dtype=torch.bool)
    for band in bands:
        cells = [band.overlap.diagonal(1).mean(), band.overlap[off].mean(), band.overlap.min()]
        cells += [band.corrected.diagonal(1).mean(), band.corrected[off].mean()]
        shown = (f"{float(cell):.3f}" for cell in cells)
        table.add_row(f"{band.begin} to {band.end - 1}", f"{band.queries:,}", f"{band.chance:.3f}", *shown)
    Console(width=max(Console().width, 110)).print(table)
    if out is not None:
        rows = [
            {"begin": b.begin, "end": b.end, "queries": b.queries, "chance": b.chance, "overlap": b.overlap.tolist()}
            for b in bands
        ]
        _write(out / OVERLAP, {"pattern": stack.pattern, "bands": rows})


def gates_(
    model: ModelName = DEFAULT,
    /,
    scored: Annotated[Scored, tyro.conf.arg(name="")] = Scored(),  # noqa: B008
    all_full: bool = False,
) -> None:
    """Whether a model can tell patterns apart: what it selects has to matter, or a search means nothing.

    Ends with exit code 0 if every gate is open, else 1.

    Args:
        model: A checkpoint directory; the twelve-layer one that comes with nanoglm if left out.
        scored: The sequences.
        all_full: With indexers in every layer, those of Shared layers from the file that training left beside.
    """
    loaded = _loaded(model, all_full)
    stack, found = GLMStack(loaded.module), scored.of(loaded)
    rows = gates(stack, found)
    table = Table("", "gate", "value", "expected")
    for row in rows:
        mark, style = ("open", "green") if row.ok else ("SHUT", "bold red")
        table.add_row(mark, row.name, f"{row.value:.4g}", row.expected, style=style)
    Console(width=max(Console().width, 90)).print(table)
    sys.exit(0 if all(row.ok for row in rows) else 1)


def search(
    model: ModelName = DEFAULT,
    /,
    keep: str = "1/4",
    method: tuple[Method, ...] = ("greedy", "uniform"),
    scored: Annotated[Scored, tyro.conf.arg(name="")] = Scored(),  # noqa: B008
    patterns: tuple[str, ...] = (),
    blocks: int = 1,
    all_full: bool = False,
    stream: bool = False,
    memory: str = "1GB",
    dtype: Literal["float32", "bfloat16"] = "float32",
    out: Path | None = None,
) -> None:
    """Find the indexers that a model can do without, by the loss on fixed sequences.

    Args:
        model: A checkpoint directory; the twelve-layer one that comes with nanoglm if left out.
        keep: How many indexers stay, as a share of the layers or a number. greedy passes every number above it.
        method: greedy, swap, beam, exhaustive, uniform, random, similarity, overlap; one or several.
        scored: The sequences.
        patterns: These beside those that are found, F and S.
        blocks: Stages of a pipeline, each of which is to begin with an F; greedy alone keeps to them.
        all_full: With indexers in every layer, those of Shared layers from the file that training left beside.
        stream: Read each layer from the checkpoint when it is needed, for a model larger than memory.
        memory: What the states between two layers may take, such as 8GB.
        dtype: Of the weights in memory.
        out: A folder for what is found; a search that was interrupted goes on there.
    """
    if blocks > 1 and (others := {"swap", "beam", "exhaustive"} & set(method)):
        raise InputError(f"blocks is {blocks} with method {min(others)}; expected greedy, which alone keeps to blocks")
    with _ranks() as ranks:
        weights = torch.float32 if dtype == "float32" else torch.bfloat16
        loaded = _loaded(model, all_full, weights, stream)
        stack = GLMStack.streamed(model, weights, all_full) if stream else GLMStack(loaded.module, dtype=weights)
        found = scored.of(loaded)
        if scored.length <= (topk := stack.model.config.index_topk):
            raise InputError(f"length is {scored.length}; expected some times the {topk} tokens that each selects")
        full, first = count_of(keep, len(stack.pattern)), ranks is None or ranks.first
        for each in patterns:
            check(each, stack.pattern)
        settings = {
            "model": Path(model).name, "pattern": stack.pattern, "sequences": len(found), "length": scored.length,
            "data": found.digest, "dtype": dtype, "topk": topk,
        }  # fmt: skip

        def begin() -> dict[str, Score]:
            if out is None:
                return {}
            _begin(out, settings)
            return read_scores(out / EVALUATIONS, len(found), cut=True)

        known = begin() if ranks is None else ranks.first_does(begin)
        own, gather = (found, None) if ranks is None else _share(found, ranks)
        console, evaluator = Console(stderr=True, quiet=not first), Evaluator(stack, own, budget=_bytes(memory))
        with Progress(
            *Progress.get_default_columns(), TimeElapsedColumn(), console=console, transient=True,
            disable=not console.is_terminal,
        ) as bar:  # fmt: skip
            task = bar.add_task("the model's own pattern", total=None)
            run = Search(
                evaluator, None if out is None else out / EVALUATIONS, known=known, data=found, gather=gather,
                writes=first, together=128 if stream else 32, progress=lambda done: bar.update(task, completed=done),
            )  # fmt: skip
            began = time.perf_counter()
            run.begin()
            seconds = time.perf_counter() - began
            rows: list[Row] = [run.row("all", run.own)]
            run.losses(patterns)
            rows += [run.row("given", each) for each in patterns]
            for name in method:
                count, lasts = cost(name, full, run.own, seconds)
                console.print(f"{name}: about {count:,} patterns, at most {lasts / 60:.1f} min", highlight=False)
                bar.update(task, description=name, total=run.evaluated + count)
                rows += (these := by(run, name, full, blocks=blocks, seed=scored.seed))
                if not these:
                    console.print(f"{name}: no definition fits {run.own}, which lacks indexers", highlight=False)
                if first and out is not None:  # after each: the next may be cut off
                    _keep(out / RESULT, full, settings, rows)
        if first:
            _tell(rows, full)
            if out is not None:
                _keep(out / RESULT, full, settings, rows)


def _keep(file: Path, full: int, settings: dict[str, Any], rows: list[Row]) -> None:
    """Writes the rows, behind those of other methods that an earlier search for as many indexers left."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        held = {}
    found = {row.method for row in rows}
    before = [row for row in held.get("rows", ()) if row["method"] not in found] if held.get("full") == full else []
    own = [asdict(row) for row in rows]
    _write(file, {"full": full, "settings": settings, "rows": own[:1] + before + own[1:]})


def by(run: Search, method: Method, full: int, *, blocks: int = 1, seed: int = 0) -> list[Row]:
    """The rows of one method."""
    if method == "greedy":
        return run.greedy(full, blocks)
    if method == "swap":
        return [run.swap(run.greedy(full)[-1].pattern)]
    if method == "beam":
        return [run.beam(full)]
    if method == "exhaustive":
        return [run.exhaustive(full)]
    if method == "uniform":
        return run.uniform(full)
    if method == "random":
        return run.random(full, seed=seed)
    stack, data = run.evaluator.stack, run.data  # all sequences: every process has to come to the same pattern
    if method == "overlap":
        return [run.alike(method, merged(overlap(stack, data)).overlap, full)]
    if not isinstance(stack, GLMStack):
        raise InputError("method is similarity; expected a GLM, whose attention it looks at")
    return [run.alike(method, similarity(stack, data), full)]


def distil(
    model: Positional[Path],
    pattern: Positional[str],
    out: Path,
    /,
    text: Path,
    tasks: bool = False,
    hops: float = 0.4,
    warmup: int = 300,
    steps: int = 400,
    length: int = 512,
    tokens: int = 1024,
    rate: float = 5e-4,
    topk: int | None = None,
    own_layer: bool = False,
    seed: int = 0,
    resume: bool = False,
) -> None:
    """Train a model to live with a pattern: warm up the indexers that stay, then all under their Selections.

    Args:
        model: A checkpoint directory, best one that was pre-trained densely.
        pattern: F and S, one letter a layer.
        out: The checkpoint directory to write.
        text: A UTF-8 file or a folder of .txt files, or a folder that nanoglm data wrote.
        tasks: Learn from the tasks of long context, for which the text is filler.
        hops: Share of chains of several hops among the tasks.
        warmup: Steps in which the indexers alone learn.
        steps: Steps in which all learns under their Selections.
        length: Tokens of a sequence.
        tokens: Of a step.
        rate: Of the second stage, at its beginning.
        topk: Tokens that each selects from here on; the model's own number if left out.
        own_layer: Indexers learn their own layer's attention, not the mean of all that they serve.
        seed: Of the data.
        resume: Go on with the run that out holds.
    """
    from nanoglm.indexcache.distil import distil as train
    from nanoglm.indexcache.distil import recipe_of
    from nanoglm.train.run import corpus

    loaded = load(model)
    recipe = recipe_of(
        warmup, steps, length, tasks, tokens=tokens, warmup=20, rate=rate, weight_decay=0.01, late=1.0,
        own_layer_kl=own_layer, hops=hops, skip_positions=False, seed=seed,
    )  # fmt: skip
    found = corpus(text, tokenizer=loaded.tokenizer if loaded.has_tokenizer else None)
    train(loaded.module, pattern, found, recipe, out, topk=topk, resume=resume)


def apply_(model: Positional[Path], pattern: Positional[str], out: Positional[Path], /) -> None:
    """Write a checkpoint with a pattern: its schedule in config.json, without the indexers that it saves.

    Args:
        model: The checkpoint directory to read.
        pattern: F and S, one letter a layer.
        out: The directory to write.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("copying", total=1.0)
        config = apply(model, pattern, out, lambda share: progress.update(task, completed=share))
    print(f"{out}: {len(config.full_layers)} of {config.num_hidden_layers} indexers ({config.pattern})")
    for engine, line in launch_lines(out, config).items():
        print(f"{engine:<14}{line}")


def report(run: Positional[Path], /) -> None:
    """Draw what a folder holds: report.html, which needs nothing beside it, and its plots as PNG.

    Args:
        run: A folder that nanoglm indexcache search and overlap, or recipes/indexcache_nano.sh, wrote into.
    """
    from nanoglm.indexcache.report import report as write

    for path in write(run):
        print(path)


def _verb(name: str, run: Any) -> Any:
    return Annotated[Any, subcommand(name=name, constructor=run, prefix_name=False)]


# What tyro reads nested subcommands from.
Verb = (
    _verb("gates", gates_) | _verb("overlap", overlap_) | _verb("search", search) | _verb("distil", distil)
    | _verb("apply", apply_) | _verb("report", report)
)  # fmt: skip


def _loaded(model: str, all_full: bool, dtype: torch.dtype = torch.float32, meta: bool = False) -> Model:
    """The model, on request with the Shared layers' own indexers; on meta without weights."""
    directory = checkpoint_directory(model)
    if directory is None and (all_full or meta):
        raise InputError(f"model is {model}; expected a checkpoint directory, which layers and indexers are read from")
    if directory is None or not all_full or meta:
        return load(model, dtype=dtype, device="meta" if meta else "cpu")
    full, own = all_full_of(directory, dtype=dtype), load(directory, device="meta")
    if full is None:
        raise InputError(f"model {model} has no {SHARED_INDEXERS}; expected the file that training on text leaves")
    return Model(full.module, own.tokenizer if own.has_tokenizer else None)


def _bytes(memory: str) -> int:
    return int(parse_bytes("memory", memory) or 0)


# --------------------------------------------------------------------------------- processes
def _ranks() -> AbstractContextManager[Any]:
    """The processes that torchrun started, if it did; else none, and training is not imported."""
    import torch.distributed as dist

    if not dist.is_torchelastic_launched():
        return nullcontext(None)
    from nanoglm.train.parallel import launched

    return launched()


def _share(data: Calibration, ranks: Any) -> tuple[Calibration, Callable[[Tensor], Tensor]]:
    """This process's sequences, and how the scores of all come together."""
    import torch.distributed as dist

    n, world = len(data), ranks.world
    if n < world:
        raise InputError(f"sequences is {n}; expected at least one for each of {world} processes")
    borders = [n * r // world for r in range(world + 1)]

    def gather(values: Tensor) -> Tensor:
        parts = [values.new_empty(end - begin) for begin, end in zip(borders, borders[1:], strict=False)]
        largest = max(len(part) for part in parts)
        padded = [values.new_zeros(largest) for _ in parts]
        dist.all_gather(padded, torch.cat([values, values.new_zeros(largest - len(values))]))
        return torch.cat([p[: len(part)] for p, part in zip(padded, parts, strict=True)])

    return data.part(borders[ranks.rank], borders[ranks.rank + 1]), gather


# --------------------------------------------------------------------------------- files
def _begin(out: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or sees that it is this search's."""
    file = out / SETTINGS
    if file.exists():
        try:
            held = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"out {out} holds a {SETTINGS} that cannot be read; expected a search's") from None
        differs = [name for name in settings if held.get(name) != settings[name]]
        if differs:
            name = differs[0]
            raise InputError(f"out {out} is of a search with {name} {held.get(name)}; expected {settings[name]}")
    else:
        _write(file, settings)


def _write(file: Path, content: Any) -> None:
    partial = file.with_name(f".{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise InputError(f"out {file.parent} cannot be written: {error.strerror}") from None


def _tell(rows: list[Row], full: int) -> None:
    """The table: each method's last row, greedy's every number of indexers."""
    table = Table("method", "indexers", "pattern", "nats/token", "more than its own", "right")
    for row in rows:
        more = f"{row.difference:+.4f} +- {row.error:.4f}"
        right = " ".join(f"{group} {share:.1%}" for group, share in row.right.items())
        table.add_row(
            row.method, str(row.full), row.pattern, f"{row.loss:.4f}", more, right,
            style="bold" if row.full == full and row.method != "all" else None,
        )  # fmt: skip
    Console(width=max(Console().width, 110 + len(rows[0].pattern))).print(table)
