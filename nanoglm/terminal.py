"""``nanoglm chat``: a conversation in the terminal, thought folded away."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, cast

import torch
import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

from nanoglm.api import ASSISTANT, Model, load
from nanoglm.chat.constraint import Constraint, Grammars
from nanoglm.chat.effort import effort_switches
from nanoglm.chat.files import sampling_defaults
from nanoglm.chat.parser import Delta
from nanoglm.chat.reader import Reader
from nanoglm.engine import Engine, Request, SamplingParams
from nanoglm.engine.request import accepted_length
from nanoglm.errors import InputError
from nanoglm.llm import LLM

Effort = Literal["off", "high", "max"]
LEVELS: dict[str, str] = {"off": "none", "high": "high", "max": "max"}
HELP = """/effort off|high|max   how hard to think     /thought      show the last thought
/new                   forget everything     /quit         leave (or Ctrl-D); Ctrl-C stops an answer"""


@dataclass
class Session:
    """A conversation with a model.

    Attributes:
        messages: so far, as the template takes them. effort: a level of the terminal's. budget: most tokens of thought.
    """

    model: Model
    engine: Engine
    params: SamplingParams
    effort: Effort = "max"
    budget: int | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def say(self, text: str) -> Answer:
        """Asks; iterate over the answer to have it, it is remembered as far as it came.

        Raises:
            InputError: the conversation has no room left.
        """
        self.messages.append({"role": "user", "content": text})
        try:
            return Answer(self)
        except InputError:
            self.messages.pop()
            raise


class Answer:
    """One answer on its way.

    Attributes:
        thought, content: so far. seconds: that it took so far.
    """

    def __init__(self, session: Session) -> None:
        model, switches = session.model, effort_switches(LEVELS[session.effort])
        ids = model.template.encode(model.tokenizer, session.messages, add_generation_prompt=True, **switches)
        room = model.config.max_position_embeddings - len(ids)
        if room < 1:
            raise InputError(
                f"conversation has {len(ids)} tokens; expected fewer than the context, start anew with /new"
            )
        most = min(session.params.max_tokens, room)
        thinking, mask = ids[-1:] == model.tokenizer.encode("<think>"), None
        if thinking and session.budget is not None:
            grammars = Grammars(model.tokenizer, model.config.vocab_size, model.config.eos_token_id)
            mask = Constraint(grammars, most, thinking=True, budget=session.budget)
        params = replace(session.params, max_tokens=most, mask=mask, stop_ids=model.config.eos_token_id)
        self._session, self._reader = session, Reader(model.tokenizer, thinking)
        self.request: Request = session.engine.add(ids, params)
        self.thought = self.content = ""
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Delta]:
        session, began = self._session, time.perf_counter()
        try:
            while self.request.finish is None:
                for request, tokens in session.engine.step():
                    for token in tokens if request is self.request else ():
                        yield from self._take(self._reader.push(token))
                        self.seconds = time.perf_counter() - began
            yield from self._take(self._reader.finish(self.request.finish == "stop"))
        finally:
            session.engine.abort(self.request)
            said = {"role": "assistant", "content": self.content, "reasoning_content": self.thought}
            session.messages.append(said)

    def _take(self, deltas: list[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            if delta.kind == "reasoning":
                self.thought += delta.text
            else:
                self.content += delta.text
            yield delta

    @property
    def thoughts(self) -> int:
        """Tokens of thought."""
        return self._reader.thought

    @property
    def figures(self) -> str:
        """Tokens, speed and what drafts gave."""
        tokens = len(self.request.outputs)
        speed = f"{tokens / self.seconds:.0f} tokens/s" if self.seconds else "no time"
        length = accepted_length([self.request])
        return f"{tokens} tokens, {speed}" + (f", {length:.2f} a step" if self.request.drafted else "")


def chat(
    model: Annotated[str | None, tyro.conf.Positional] = None,
    /,
    effort: Effort = "max",
    budget: int | None = None,
    system: str | None = None,
    max_tokens: int = 1024,
    temperature: float | None = None,
    seed: int = 0,
    memory: str = "2GB",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Talk with a model in the terminal. What it thinks is folded to a line; /effort switches how hard it does.

    Args:
        model: A checkpoint directory or a preset; the bundled assistant if left out.
        effort: How hard to think: off, high or max.
        budget: Most tokens of thought.
        system: A system message.
        max_tokens: Most tokens of an answer, thought included.
        temperature: 0 is greedy; as the checkpoint says if left out.
        seed: Of the sampler.
        memory: For weights, workspace and cache, such as 2GB.
        dtype: Of the weights in memory.
    """
    llm = LLM(load(model or ASSISTANT, dtype=getattr(torch, dtype)), memory=memory, quiet=True)
    given: dict[str, Any] = sampling_defaults(llm.model.directory)
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **given)
    if temperature is not None:
        params = replace(params, temperature=temperature)
    session = Session(llm.model, llm.engine, params, effort, budget)
    if system is not None:
        session.messages.append({"role": "system", "content": system})
    talk(session, Console(highlight=False, soft_wrap=True))


def talk(session: Session, console: Console) -> None:
    """Reads lines until there are no more; what begins with a slash is a command."""
    first, thought = list(session.messages), ""
    if console.is_terminal:
        console.print(HELP, style="dim", markup=False)
    while (line := _read(session, console)) is not None:
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            break
        elif command == "/new":
            session.messages[:] = first
        elif command == "/thought":
            console.print(thought or "no thought yet", style="dim", markup=False)
        elif command == "/effort" and rest.strip() in LEVELS:
            session.effort = cast(Effort, rest.strip())
        elif command.startswith("/"):
            console.print(HELP, style="dim", markup=False)
        elif command:
            try:
                thought = _show(session.say(line), console)
            except InputError as error:
                console.print(f"{error}", style="red", markup=False)


def _read(session: Session, console: Console) -> str | None:
    """The next line; None at the end."""
    if not console.is_terminal:
        return line.rstrip("\n") if (line := sys.stdin.readline()) else None
    try:
        return console.input(f"[bold cyan]{session.effort}>[/] ")
    except EOFError:
        console.print()
        return None
    except KeyboardInterrupt:
        console.print()
        return ""


def _show(answer: Answer, console: Console) -> str:
    """Prints an answer as it comes; returns its thought."""
    try:
        deltas = iter(answer)
        delta = next(deltas, None)
        if delta is not None and delta.kind == "reasoning":
            with Live(console=console, transient=True, refresh_per_second=8) as live:
                while delta is not None and delta.kind == "reasoning":
                    live.update(Text("\n".join(answer.thought.splitlines()[-4:]), style="dim italic"))
                    delta = next(deltas, None)
            console.print(f"thought for {answer.thoughts} tokens", style="dim italic")
        while delta is not None:
            console.print(delta.text, end="", markup=False)
            delta = next(deltas, None)
        console.print()
    except KeyboardInterrupt:
        console.print(" ... stopped", style="dim")
    console.print(answer.figures, style="dim")
    return answer.thought
