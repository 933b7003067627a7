"""What every engine's line is made of: the text itself, and the checks of drafts, patterns and memory.

Sources: serving spec 4.6 (drafts) and 6.1 (memory); indexcache spec 6.1 (patterns).
"""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass, field

from nanoglm.config import SHARED, GLMConfig
from nanoglm.errors import InputError
from nanoglm.launch.pattern import searched
from nanoglm.launch.target import Platform, Target, Wish
from nanoglm.plan import served_cache

PARSERS = ["--tool-call-parser", "glm47", "--reasoning-parser", "glm45"]
LARGE = 80e9  # bytes of weights from which eight GPUs are taken unless a number is given


@dataclass
class Launch:
    """Lines for a shell, notes, and whether it fits the memory that was named (None if none was)."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    fits: bool | None = None

    def __str__(self) -> str:
        # Names in files may hold line ends, and what follows one would be run, not read; or change the terminal.
        notes = ("".join(letter if letter.isprintable() else " " for letter in note) for note in self.notes)
        return "\n".join([*self.lines, *("# " + note for note in notes)])

    def note(self, *notes: str) -> None:
        """More notes, a line each."""
        self.notes += notes

    def run(self, *words: str) -> None:
        """One more line."""
        self.lines.append(shlex.join(words))

    def directory(self, target: Target) -> str:
        """Where the checkpoint lies, after a line that downloads it if it is a repository's."""
        if not target.repository:
            return target.name
        folder = target.name.rpartition("/")[2]
        self.run("hf", "download", target.name, "--local-dir", folder)
        return folder

    def serve(self, words: list[str], wish: Wish) -> None:
        """The server's line, with where it listens. The key stays a variable: it is in no history, and must be set."""
        line = shlex.join([*words, "--host", wish.host, "--port", str(wish.port)])
        self.lines.append(line + (f' --api-key "${{{wish.api_key_env}:?}}"' if wish.api_key_env else ""))
        if not wish.api_key_env and wish.host not in ("127.0.0.1", "::1", "localhost"):
            self.note(f"WARNING: whoever reaches {wish.host} may use it; --api-key-env names a key to ask for")


def gb(count: float) -> str:
    """Bytes in GB, for notes."""
    return f"{count / 1e9:,.1f}"


def gpus_of(target: Target, wish: Wish) -> int:
    """GPUs of tensor parallelism. Raises InputError if the heads cannot be shared out."""
    gpus, heads = wish.gpus, target.config.num_attention_heads
    if gpus is None:
        gpus = math.gcd(8, heads) if target.weights >= LARGE else 1
    if gpus < 1 or heads % gpus:
        raise InputError(f"gpus is {gpus}; expected a number that divides num_attention_heads ({heads})")
    return gpus


def platform_of(target: Target, wish: Wish, out: Launch) -> Platform:
    """The platform asked for, else the one that the format was made for."""
    recipes: dict[str, Platform] = {"nvfp4": "blackwell", "mxfp4": "amd"}
    made = recipes.get(target.found.format)
    if made and wish.platform not in (None, made):
        out.note(f"WARNING: the recipe for {target.found.format} is for {made}, not for {wish.platform}")
    return wish.platform or made or "hopper"


def drafts_of(target: Target, wish: Wish, usual: int | None, out: Launch) -> int:
    """Drafts a step; none without tensors of the MTP layer, with which an engine would draft noise (spec 4.6).

    Args:
        usual: unless the user names a number; None for the recipe's, 5 with shared indices and 3 without.
    """
    if usual is None:
        usual = 5 if SHARED in target.config.indexer_types else 3
    layer = f"model.layers.{target.config.num_hidden_layers}.*"
    announced = target.config.num_nextn_predict_layers > 0
    if target.found.mtp is False or not announced:
        if wish.drafts:
            raise InputError(f"drafts is {wish.drafts}; expected 0, {target.name!r} has no MTP layer ({layer})")
        said = "config.json announces one, and engines would draft noise" if announced else "config.json names none"
        out.note(f"no MTP layer: {'no tensors ' + layer if target.found.mtp is False else layer}; {said}")
        if target.found.unnamed:
            names = ", ".join(target.found.unnamed[:3])
            out.note(f"the index file does not name {names}: if the MTP layer is there, mend the index first")
        return 0
    if target.found.mtp is None:
        out.note(f"MTP: no index file, so nobody looked for the tensors {layer}")
    return usual if wish.drafts is None else wish.drafts


def pattern_of(target: Target, out: Launch) -> GLMConfig | None:
    """The configuration whose pattern an engine must be told, if it must."""
    if not searched(target.config):
        return None
    out.note(
        f"pattern {target.config.pattern}: not GLM-5.2's own, so the line says it; vLLM's documentation asks for "
        "use_index_cache, newer code reads the pattern alone (CONFLICT)"
    )
    return target.config


def length_of(target: Target, wish: Wish, cap: int, token: int, left: float | None) -> int:
    """Tokens of context: as asked, else ``cap`` or what ``left`` bytes of memory hold.

    Raises:
        InputError: more than the model's positions.
    """
    positions = target.config.max_position_embeddings
    if wish.length is not None:
        if wish.length > positions:
            raise InputError(f"length is {wish.length}; expected at most max_position_embeddings ({positions})")
        return wish.length
    length = min(cap, positions)
    held = length if left is None else int(left // token)
    return length if held >= length or held < 1024 else held // 1024 * 1024


def room(
    target: Target, wish: Wish, out: Launch, *, gpus: int, each: float, cache: str, mtp: bool, share: float, cap: int,
    activations: float = 0.0,
) -> int:  # fmt: skip
    """The length, after a note on whether each GPU holds its ``each`` bytes of weights and the whole cache.

    Args:
        share: of a GPU's memory that the engine takes. cap: the recipe's longest context.
        activations: bytes of that share that are neither (INFERRED); 0 where the engine takes them from the rest.
    """
    token = served_cache(target.config, cache, mtp)
    budget = None if wish.memory is None else share * wish.memory - activations
    length = length_of(target, wish, cap, token, None if budget is None else budget - each)
    need = each + token * length
    out.note(
        f"each GPU: {gb(each)} GB of weights ({gb(target.weights)} GB of {target.found.format} {target.source}) + "
        f"{gb(token * length)} GB of cache ({length:,} tokens x {token:,} bytes, {cache}) = {gb(need)} GB"
    )
    if gpus > 1:
        out.note(
            f"the latent cache is replicated on all {gpus} GPUs under tensor parallelism; DP attention or context "
            "parallelism divides it instead"
        )
    if gpus > 8:
        out.note("more than 8 GPUs are several nodes: this line lacks their options")
    if budget is not None and wish.memory is not None:
        out.fits = need <= budget
        less = f" less {gb(activations)} GB for activations (INFERRED)" if activations else ""
        limit = f"{gb(budget)} GB ({share:.0%} of {gb(wish.memory)} GB{less})"
        if out.fits:
            out.note(f"fits: {gb(need)} of {limit}; room for {int((budget - each) // token):,} tokens, all requests")
        elif each > budget:
            out.note(f"WARNING: does not fit: the weights alone are {gb(each)} of {limit} on each GPU")
        else:
            out.note(
                f"WARNING: does not fit: {gb(need)} of {limit} on each GPU; at most {int((budget - each) // token):,} "
                "tokens do"
            )
    return length


def in_ram(out: Launch, wish: Wish, need: float, what: str) -> None:
    """A note on whether the machine's memory holds what is not on a GPU."""
    if wish.ram is None:
        out.note(f"RAM: {gb(need)} GB for {what}")
        return
    fits = need <= wish.ram
    out.fits = fits and out.fits is not False
    out.note(f"{'RAM' if fits else 'WARNING: does not fit in RAM'}: {gb(need)} of {gb(wish.ram)} GB for {what}")
