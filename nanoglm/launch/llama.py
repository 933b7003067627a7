"""llama.cpp: a GGUF file, and which experts stay in the machine's memory. Source: serving spec 6.5."""

from __future__ import annotations

from pathlib import Path

from nanoglm.errors import InputError
from nanoglm.launch.line import Launch, drafts_of, gb, in_ram, length_of
from nanoglm.launch.pattern import searched
from nanoglm.launch.target import Target, Wish
from nanoglm.plan import plan, served_cache

LENGTH = 131_072  # unless one is given
Experts = tuple[tuple[int, float], ...]  # layer, bytes of its routed experts


def llama(target: Target, wish: Wish, out: Launch) -> None:
    """The lines for llama.cpp's server, with conversion first if the target is no GGUF.

    Raises:
        InputError: FP8 for the cache, more than the model's positions, or drafts without an MTP layer.
    """
    if wish.kv_cache == "fp8":
        raise InputError("kv-cache is 'fp8'; expected bf16 or none (q8_0) for llama.cpp")
    file, size, experts = target.name, float(target.weights), target.found.experts
    if target.found.format != "gguf":
        file, size, experts = _converted(target, out)
    gpus = 1 if wish.gpus is None else wish.gpus
    memory = None if wish.memory is None or not gpus else 0.9 * gpus * wish.memory
    rest = size - sum(nbytes for _, nbytes in experts)
    cache = wish.kv_cache or "q8_0"
    token = served_cache(target.config, cache, target.found.mtp is not False and wish.drafts != 0)
    length = length_of(target, wish, LENGTH, token, None if memory is None else memory - rest)
    need = rest + token * length
    held, flags = _placed(experts, None if memory is None else memory - need, gpus)
    fits = memory is not None and need + held <= memory
    drafts = drafts_of(target, wish, 3 if fits and not flags else 0, out)
    words = ["llama-server", "-m", file, "--jinja", "-c", str(length), "-ngl", "999" if gpus else "0", *flags]
    words += ["-fa", "on", "-ctk", cache, "-ctv", cache, "--temp", "1.0", "--top-p", "0.95"]
    words += ["--chat-template-kwargs", '{"reasoning_effort": "high"}']
    words += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(drafts)] if drafts else []
    out.serve(words, wish)
    out.note(
        f"memory: {gb(size)} GB of weights ({gb(size - rest)} GB of them routed experts) + {gb(token * length)} GB of "
        f"cache ({length:,} tokens x {token:,} bytes, {cache})"
    )
    if memory is not None:
        out.fits = fits
        out.note(
            f"{'fits' if fits else 'WARNING: does not fit'}: {gb(need)} GB and {gb(held)} GB of experts in "
            f"{gb(memory)} GB (90% of {gpus} x {gb(wish.memory or 0)} GB, INFERRED)"
        )
    in_ram(out, wish, size - rest - held if gpus else need + size - rest, "the rest")
    if flags and wish.memory is None:
        out.note("all experts in RAM: with --memory of one GPU, as many layers of them as fit are left there")
    _traps(target, flags, out)


def _traps(target: Target, flags: list[str], out: Launch) -> None:
    if flags:
        out.note(
            "trap: with several GPUs --n-cpu-moe puts all experts that are left on the last one; place them by device: "
            r"-ot 'blk\.[34]\.ffn_.*_exps=CUDA0' -ot 'blk\.[56]\.ffn_.*_exps=CUDA1' -ot 'ffn_.*_exps=CPU'"
        )
    out.note(
        "needs llama.cpp of July 2026 or later (PR 25407 runs the indexer, 25980 MTP); without --jinja no tools",
        'effort: this line asks for High, without --chat-template-kwargs it is Max; "low" and "minimal" do nothing, '
        "--reasoning-budget 0 turns thinking off",
    )
    if target.found.mtp:
        out.note(
            "drafts: 3 where all is on GPUs (PR 25980: 2.98 tokens a step), else as --drafts says: with experts in RAM "
            "they hardly pay (CONFLICT: Unsloth found 27 tokens/s with MTP, 45 without)"
        )
    if searched(target.config):
        out.note("pattern: the GGUF must hold glm-dsa.attention.indexer.types, else llama.cpp takes GLM-5.2's own")


def _converted(target: Target, out: Launch) -> tuple[str, float, Experts]:
    """The lines that make a GGUF of a checkpoint in q8_0; its name, bytes and experts, computed."""
    config, folder = target.config, out.directory(target)
    stem = Path(folder).resolve().name or "model"
    file = f"{'./' if stem.startswith('-') else ''}{stem}-q8_0.gguf"
    out.run("python", "convert_hf_to_gguf.py", folder, "--outfile", file, "--outtype", "q8_0")
    out.note(
        "llama.cpp reads GGUF only: convert first (the script is llama.cpp's; f32, f16, bf16, q8_0), or name the first "
        "file of a published one here (of GLM-5.2: 2 bits 239 GB, 4 bits 372 to 475 GB of memory in all)"
    )
    one = 3 * config.n_routed_experts * config.hidden_size * config.moe_intermediate_size * 34 / 32
    layers = range(config.num_hidden_layers + (1 if target.found.mtp else 0))
    total = plan(config, 1)["parameters"]["total" if target.found.mtp else "without_mtp"]
    return file, total * 34 / 32, tuple((i, one) for i in layers if config.is_moe(i))


def _placed(experts: Experts, left: float | None, gpus: int) -> tuple[float, list[str]]:
    """Bytes of experts that ``left`` bytes of GPUs hold, and the flags for the others."""
    total = sum(nbytes for _, nbytes in experts)
    if not gpus or not experts:
        return 0.0, []
    if left is not None and total <= left:
        return total, []
    held, first = 0.0, None
    for layer, nbytes in reversed(experts if gpus == 1 and left is not None else ()):
        if left is None or held + nbytes > left:
            break
        held, first = held + nbytes, layer
    return held, ["--cpu-moe"] if first is None else ["--n-cpu-moe", str(first)]
