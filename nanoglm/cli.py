"""One command, subcommands by verb. Without a model each uses the bundled default."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from json import dumps
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from nanoglm import plan as planning
from nanoglm.api import checkpoint_directory, load
from nanoglm.bench.commands import Verb
from nanoglm.cache import PagedCache
from nanoglm.config import GLMConfig
from nanoglm.engine import SamplingParams
from nanoglm.engine.request import accepted_length
from nanoglm.errors import InputError, NanoglmError
from nanoglm.eval.commands import longcontext
from nanoglm.eval.perplexity import all_full, evaluate
from nanoglm.indexcache.commands import Verb as IndexCacheVerb
from nanoglm.launch.commands import launch
from nanoglm.ops import count_work, cpu
from nanoglm.server.commands import serve
from nanoglm.terminal import chat
from nanoglm.train.commands import data, recipe_of, report, training
from nanoglm.train.recipe import Recipe
from nanoglm.verify import Receipt, verify
from nanoglm.verify import endpoint as endpoints
from nanoglm.verify.endpoint import Shape
from nanoglm.weights import inspect as inspection
from nanoglm.weights.slice import slice_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DType = Literal["float32", "bfloat16", "float16"]
Text = tyro.conf.Positional[str]


def generate(
    prompt: Text = "-",
    /,
    model: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.8,
    top_k: int | None = None,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    dtype: DType = "float32",
) -> None:
    """Continue a prompt, streaming the text to standard output.

    Args:
        prompt: The text to continue; - reads standard input.
        model: A checkpoint directory or a preset; the bundled model if left out.
        max_tokens: Most tokens to generate.
        temperature: 0 is greedy.
        top_k: Sample among the k likeliest tokens only.
        seed: Of the sampler.
        stop: Texts that end the continuation.
        dtype: Of the weights in memory.
    """
    params = SamplingParams(max_tokens, temperature, top_k, seed)
    loaded = load(model, dtype=DTYPES[dtype])
    _print_stream(loaded.stream(_read_prompt(prompt), params, stop=stop))


def demo(prompt: Text = "It was a dark evening in November, and", /, max_tokens: int = 400, seed: int = 1) -> None:
    """Stream a continuation by the bundled model and show what IndexShare saved.

    Args:
        prompt: The text to continue.
        max_tokens: Most tokens to generate.
        seed: Of the sampler.
    """
    model = load()
    config, console = model.config, Console(highlight=False)
    console.print(prompt, style="bold", markup=False, end="", soft_wrap=True)
    began = time.perf_counter()
    with count_work() as work:
        generation = model.start([prompt], SamplingParams(max_tokens, 0.8, None, seed))
        text = _print_stream(piece for _, piece in generation)
    seconds = time.perf_counter() - began
    full, layers = len(config.full_layers), config.num_hidden_layers
    everywhere = work.pairs_scored + (layers - full) * generation.engine.runner.pairs
    tokens = len(model.tokenizer.encode(text))
    console.print(f"\nlayers       {full} Full + {layers - full} Shared ({config.pattern})")
    console.print(
        f"IndexShare   {1 - work.pairs_scored / everywhere:.1%} of the indexer work removed "
        f"({work.pairs_scored:,} of {everywhere:,} pairs scored)",
        soft_wrap=True,
    )
    (request,) = generation.requests
    accepted, drafted = sum(request.accepted), sum(request.drafted)
    length = accepted_length(generation.requests)
    console.print(f"MTP          {length:.2f} tokens a step ({accepted} of {drafted} drafts accepted)")
    console.print(f"speed        {tokens / seconds:.1f} tokens/s ({tokens} tokens in {seconds:.1f} s)")
    cache = PagedCache(config, 1)
    console.print(f"cache        {cache.bytes_per_token:,} bytes per token (float32, MTP layer included)")


def evaluate_text(
    text: Path,
    model: str | None = None,
    context: int = 512,
    tokens: int | None = None,
    dtype: DType = "float32",
    index_dtype: Literal["int8"] | None = None,
) -> None:
    """Nats and bits per byte of a text: dense, all-Full sparse and IndexShare side by side.

    Args:
        text: A UTF-8 file.
        model: A checkpoint directory or a preset; the bundled model if left out.
        context: Tokens a window; each is scored on its own.
        tokens: Score only the first so many tokens.
        dtype: Of the weights in memory.
        index_dtype: Of index keys, for a row that shows what keeping them so costs.
    """
    try:
        content = text.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {text} cannot be read as UTF-8: {error}") from None
    loaded, directory = load(model, dtype=DTYPES[dtype]), checkpoint_directory(model)
    full = None if directory is None else all_full(directory, dtype=DTYPES[dtype])
    console = Console(stderr=True)
    # Even unused and transient, a Progress leaves an empty line where there is no terminal.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("evaluating", total=1.0)
        rows = evaluate(
            loaded, content, context=context, tokens=tokens, full=full,
            index_dtype=None if index_dtype is None else torch.int8,
            progress=lambda share: progress.update(task, completed=share),
        )  # fmt: skip
    table = Table("attention", "nats/token", "nats/byte", "bits/byte", "pairs scored", "rows attended")
    for row in rows:
        table.add_row(
            row.name, f"{row.nats_per_token:.4f}", f"{row.nats_per_byte:.4f}", f"{row.bits_per_byte:.4f}",
            f"{row.pairs_scored:,}", f"{row.rows_attended:,}",
        )  # fmt: skip
    Console(width=max(Console().width, 96)).print(table)  # figures are never cut
    if rows[-1].overlap is not None:
        print(f"{rows[-1].name}: {rows[-1].overlap:.2%} of what they select is what exact ones select, beyond k tokens")
    if not any(row.name == "all-Full sparse" for row in rows):
        print("all-Full sparse: not to be had, the Shared layers of this checkpoint own no indexer")


def inspect(model: Annotated[str | None, tyro.conf.Positional] = None, /) -> None:
    """Show a checkpoint's schedule, shapes, dtypes, sizes and whether every tensor is there.

    Args:
        model: A checkpoint directory (config.json and the index file are enough) or a preset; the bundled
            model if left out.
    """
    directory = checkpoint_directory(model)
    if directory is None:
        _print_lines(inspection.describe_preset(str(model)))
    else:
        lines, report = inspection.describe(directory)
        _print_lines(lines)
        report.check(directory)


def slice_(
    source: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    layers: str | None = None,
    experts: str | None = None,
    mtp: bool = True,
) -> None:
    """Cut a small checkpoint out of a large one: some layers and experts, every tensor as it lies.

    Args:
        source: The checkpoint directory to read.
        out: The directory to write.
        layers: Decoder layers to keep, such as 0-3,6; a Shared layer needs its Full layer. All if left out.
        experts: Routed experts to keep in every layer, such as 0-7. All if left out.
        mtp: Keep the MTP layer, if there is one.
    """
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("cutting", total=1.0)
        config = slice_checkpoint(
            source, out, layers=_numbers("layers", layers), experts=_numbers("experts", experts), mtp=mtp,
            progress=lambda share: progress.update(task, completed=share),
        )  # fmt: skip
    print(f"{out}: {config.num_hidden_layers} layers ({config.pattern}), {config.n_routed_experts} experts")


def plan(
    model: Annotated[str, tyro.conf.Positional],
    /,
    length: int = 131_072,
    memory: str | None = None,
    ram: str | None = None,
    memory_bandwidth: str | None = None,
    ram_bandwidth: str | None = None,
    disk_bandwidth: str | None = None,
    json: bool = False,
) -> None:
    """What a model costs at a context length: parameters, FLOPs, cache, weights, and what fits where.

    Args:
        model: A preset, a checkpoint directory or a config.json.
        length: Tokens of context.
        memory: Of the accelerator, such as 12GB.
        ram: Of the machine, such as 64GB.
        memory_bandwidth: Such as 504GB/s; with the others it bounds the speed.
        ram_bandwidth: Such as 50GB/s.
        disk_bandwidth: Such as 3GB/s, for what fits in neither.
        json: Print one JSON object instead of tables.
    """
    config = GLMConfig.from_file(model) if Path(model).exists() else GLMConfig.preset(model)
    figures = planning.plan(config, length)
    placed = []
    if memory or ram:
        for kind in planning.FORMATS:
            tiers = planning.tiers(memory, ram, memory_bandwidth, ram_bandwidth, disk_bandwidth)
            placed.append((kind, tiers, planning.place(config, length, kind, tiers)))
    if json:
        figures["placement"] = {
            kind: {"held": {t.name: t.held for t in tiers}, "read_per_token": {t.name: t.read for t in tiers},
                   "tokens_per_second_at_most": bound}
            for kind, tiers, bound in placed
        }  # fmt: skip
        print(dumps(figures))
        return
    _print_lines(planning.lines(figures))
    if placed:
        table = Table("format", *(tier.name for tier in placed[0][1]), "tokens/s at most")
        for kind, tiers, bound in placed:
            cells = [", ".join(f"{part} {n / 1e9:,.1f}" for part, n in tier.held.items()) for tier in tiers]
            table.add_row(kind, *cells, "give the bandwidths" if bound is None else f"{bound:,.3g}")
        print("\nwhat fits where, in GB (main model, batch 1, every byte read once, no time for arithmetic)")
        Console(width=max(Console().width, 120)).print(table)


def verify_(
    json: bool = False,
    faults: bool = True,
    endpoint: str | None = None,
    reference: Path | None = None,
    write_reference: Path | None = None,
    shape: Shape = "tiny",
    tolerance: float = 1e-3,
    longest: int | None = None,
    api_key: str | None = None,
) -> None:
    """The fidelity receipt: this code against transformers, layer by layer; every planted fault must show.

    With --endpoint, any engine's server against this code: below, at and above top-k, across chunks, behind prefixes.

    Ends with exit code 0 if every row is green and every fault was caught, else 1.

    Args:
        json: Print one JSON object instead of a table.
        faults: Plant the faults; without them the receipt is incomplete.
        endpoint: URL of a server that has loaded the reference checkpoint.
        reference: Directory of that checkpoint.
        write_reference: Write the reference checkpoint there, for an engine to load; nothing else is done.
        shape: Of the reference: tiny, or with the widths of attention that engines' kernels are written for.
        tolerance: Of a log-probability; 0.05 for an engine in bf16.
        longest: Tokens of the longest prompt, to reach across the engine's chunks.
        api_key: Of the server.
    """
    if write_reference is not None:
        config = endpoints.write_reference(write_reference, shape).config
        print(f"{write_reference}: {config.num_hidden_layers} layers ({config.pattern}), k {config.index_topk}")
        print(f"let an engine serve it, then: nanoglm verify --reference {write_reference} --endpoint URL")
        return
    if (endpoint is None) != (reference is None):
        raise InputError("endpoint or reference is missing; expected both (nanoglm verify --write-reference makes one)")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=1.0)

        def shown(what: str, share: float) -> None:
            progress.update(task, description=what, completed=share)

        if endpoint is not None and reference is not None:
            receipt = endpoints.verify_endpoint(
                endpoint, reference, tolerance=tolerance, longest=longest, key=api_key, progress=shown
            )
        else:
            receipt = verify(faults=faults, progress=shown)
    print(dumps(receipt.to_json())) if json else _print_receipt(receipt)
    sys.exit(0 if receipt.ok else 1)


def _print_receipt(receipt: Receipt) -> None:
    console = Console(width=max(Console().width, 130))
    rows = Table("", "row", "against", "value", "limit")
    for against, row in receipt.rows:
        mark, style = ("green", "green") if row.ok else ("RED", "bold red")
        rows.add_row(mark, escape(row.name), against, f"{row.value:.3g}", f"{row.limit:g}", style=style)
    console.print(rows)
    if receipt.faults:
        faults = Table("", "planted fault", "rows it turned red")
        for fault in receipt.faults:
            mark, style = ("red", "red") if fault.caught else ("MISSED", "bold yellow")
            more = f" and {len(fault.by) - 1} more" if len(fault.by) > 1 else ""
            faults.add_row(mark, escape(fault.name), escape(fault.by[0] + more) if fault.by else "none", style=style)
        console.print(faults)
    for sentence in receipt.not_run:
        print(f"not run: {sentence}")
    print(", ".join(f"{name} {version}" for name, version in receipt.versions.items()))
    caught = f", {sum(fault.caught for fault in receipt.faults)} of {len(receipt.faults)} planted faults red"
    print(
        f"{'ok' if receipt.ok else 'NOT OK'}: {sum(row.ok for _, row in receipt.rows)} of {len(receipt.rows)} rows "
        f"green{caught if receipt.faults else ''}"
    )


def doctor() -> None:
    """Which kernels are in use on this machine, and why."""
    best = cpu.best()
    lines = [
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads"),
        ("processor", f"{platform.machine()}, torch sees {torch.backends.cpu.get_cpu_capability()}"),
        (
            "cpu ops",
            f"C++ kernels, {best.name}" if best else "PyTorch, no C++ kernels: slower, the same within rounding",
        ),
    ]
    for name in cpu.SETS:
        found = cpu.library(name)
        lines.append(("", found if isinstance(found, str) else f"{name}: runs here"))
    lines.append(("cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"))
    _print_lines(lines)


def bench(verb: Annotated[Verb, tyro.conf.arg(name="")]) -> None:
    """Measure: ops, prefill and decoding, each figure beside its limit; and the page made of it.

    Args:
        verb: What to measure; it has run when this is called.
    """


def indexcache(verb: Annotated[IndexCacheVerb, tyro.conf.arg(name="")]) -> None:
    """The pattern lab: which layers can do without an indexer, by overlap, search and distillation.

    Args:
        verb: What to do; it has run when this is called.
    """


COMMANDS: dict[str, Callable[..., Any]] = {
    "generate": generate,
    "demo": demo,
    "eval": evaluate_text,
    "longcontext": longcontext,
    "chat": chat,
    "serve": serve,
    "inspect": inspect,
    "slice": slice_,
    "plan": plan,
    "launch": launch,
    "verify": verify_,
    "bench": bench,
    "indexcache": indexcache,
    "doctor": doctor,
    "data": data,
    "train": training(Recipe()),
    "report": report,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point. A user's mistake is one sentence on standard error and exit code 2."""
    arguments, commands = list(sys.argv[1:] if arguments is None else arguments), COMMANDS
    try:
        if len(arguments) > 1 and arguments[0] == "train" and arguments[1].endswith(".py"):
            commands = COMMANDS | {"train": training(recipe_of(Path(arguments.pop(1))))}
        tyro.extras.subcommand_cli_from_dict(commands, prog="nanoglm", args=arguments, description=__doc__)
    except NanoglmError as error:
        print(f"nanoglm: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, `head` for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _read_prompt(prompt: str) -> str:
    return sys.stdin.read() if prompt == "-" else prompt


def _print_lines(lines: Iterable[tuple[str, str]]) -> None:
    for name, value in lines:
        print(f"{name:<24}{value}".encode("utf-8", "backslashreplace").decode())


def _numbers(name: str, text: str | None) -> list[int] | None:
    """``0-3,6`` as numbers."""
    if text is None:
        return None
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(last or first) > 10**6:
            raise InputError(f"{name} is {text!r}; expected numbers and ranges such as 0-3,6")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _print_stream(pieces: Iterable[str]) -> str:
    text = ""
    for piece in pieces:
        text += piece
        print(piece, end="", flush=True)
    print()
    return text


if __name__ == "__main__":
    main()
