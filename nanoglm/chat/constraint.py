"""What a reply may be: thought that ends at its budget, then text of a JSON schema, or calls in GLM's own form.

A :class:`Constraint` is a function of the tokens generated so far: which may come next. So drafts need no care: they
are asked for like tokens, and a chain may run from thought over its end into a call; what was rejected is taken back by
asking again. The grammar begins behind the end of thought.

With a budget or a grammar there is one thought. It does not begin again behind its end, and what begins as a call
within it, which ends it for the parser too (serving spec 3.1), has the name of a tool; before a grammar nothing does.

A reply closes within its tokens. Grammars allow endless strings and numbers; so the length of the shortest way out is
kept within what is left (by walking it in a copy of the matcher), and when no more is left than one token could add to
it, only the way out is allowed. White space is fixed. Thought ends in time for all of that.

Schemas come from clients. What would take longer than a second or two to compile is refused (``check_schema``, and
llguidance's own limits). So is what takes more than ``MOST_LEAST`` tokens at least, and a way out never gets longer
than that: while it is walked nobody gets a token.

Source: serving spec 2.7, 4.7, 5.1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from nanoglm.chat.limits import check_schema
from nanoglm.chat.schema import TYPES, Schema, longest_minimum
from nanoglm.chat.tokenizer import Tokenizer
from nanoglm.errors import InputError

# Of a reply's least way: some seconds of walking at the very most.
MOST_LEAST = 4096
MOST_STATES = 50_000  # of a grammar's lexer, of some kilobytes each; llguidance's other limits are good as they are
THINK, THINK_END, CALL = "<think>", "</think>", "<tool_call>"
# Where there is a choice on the way out: what ends something, then what is short, then what patterns often ask for;
# what opens something at last.
_ENDS, _SHORT, _OPEN = b'}]",', b"01nft", b"[{"
_ORDER = _ENDS + _SHORT + b"aA-@.:/_ #+" + bytes(range(32, 127)) + bytes(range(256))
_RUN, _FEW, _TRIES = 16, 8, 24  # so many in a row end nothing; choices that are few; walks
_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles grammars over one vocabulary.

    Args:
        vocab_size: rows of the model's head; rows without a token are never allowed. stop_ids: what ends a reply.

    Raises:
        InputError: llguidance is not installed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise InputError(
                "llguidance is not installed; expected it for constrained output: nanoglm[serve]"
            ) from None
        self.tokenizer, self.vocab_size, self.stop_ids = tokenizer, vocab_size, tuple(stop_ids)
        self.bytes = [tokenizer.token_bytes(i, skip_special=False) for i in range(vocab_size)]
        self._matcher = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES)
        self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Vocabulary(self)))

    def token(self, text: str) -> int:
        """The id of a token of the markup."""
        ids = self.tokenizer.encode(text)
        if len(ids) != 1:
            raise InputError(f"tokenizer has no token {text}; expected GLM's, which calls are written in")
        return ids[0]

    @cached_property
    def markup(self) -> frozenset[int]:
        """Ids of added tokens."""
        return frozenset(i for name in self.tokenizer.added for i in self.tokenizer.encode(name))

    @cached_property
    def way_out(self) -> list[int]:
        """Ids in the order of their choice on the way out; others follow."""
        single = {text: i for i, text in reversed(list(enumerate(self.bytes))) if len(text) == 1}
        order = [byte for byte in dict.fromkeys(_ORDER) if byte not in _OPEN] + list(_OPEN)
        markup = [
            self.token(name) for name in ("</arg_value>", "</tool_call>", "</arg_key>") if name in self.tokenizer.added
        ]
        return markup + [single[text] for byte in order if (text := bytes([byte])) in single]

    @cached_property
    def quote(self) -> int:
        """The id of a quotation mark."""
        return self.bytes.index(b'"')

    def json(self, schema: Mapping[str, Any]) -> Grammar:
        """Text that a JSON schema allows, keys in the schema's order.

        Raises:
            InputError: the schema is none, or holds what cannot be kept to.
        """
        check_schema(schema, "schema")
        try:
            source = self._matcher.grammar_from_json_schema(json.dumps(schema), overrides=cast(Any, _STYLE))
        except (TypeError, ValueError) as error:
            raise InputError(f"schema is no JSON schema: {error}") from None
        return Grammar(self, source, longest_minimum(schema))

    def calls(
        self, tools: Sequence[Mapping[str, Any]], several: bool = True, otherwise: Mapping[str, Any] | None = None
    ) -> Grammar:  # fmt: skip
        """At least one call of one of these tools; and no more, without ``several``.

        Args:
            tools: function declarations without their wrapper: ``name``, ``parameters``.
            otherwise: a JSON schema whose text may stand in place of calls.

        Raises:
            InputError: parameters that are no JSON schema.
        """
        rules, longest, whole = [], 0, several or otherwise is not None or len(tools) > 1
        for number, tool in enumerate(tools):
            parameters = tool.get("parameters") or {}
            check_schema(parameters, f"tools[{number}].parameters")
            rules += self._call(f"t{number}", tool["name"], parameters)
            longest = max(longest, len(tool["name"].encode()) + 8 + longest_minimum(parameters, whole))
        names = " | ".join(f"t{number}" for number in range(len(tools)))
        begin, end = self.token(CALL), self.token("</tool_call>")
        rules += [f"calls: call{'+' if several else ''}", f"call: <[{begin}]> ({names}) <[{end}]>"]
        rules += [r"TEXT: /(.|\n)*/", r"NAME: /[A-Za-z_][A-Za-z0-9_]{0,63}/"]
        if otherwise is not None:
            check_schema(otherwise, "schema")
            rules.append(f"json: %json {json.dumps({**otherwise, 'x-guidance': _STYLE})}")
            longest = max(longest, longest_minimum(otherwise, whole))
        rules.append("start: calls" if otherwise is None else "start: calls | json")
        return Grammar(self, self._matcher.grammar_from_lark("\n".join(rules)), longest)

    def names(self, tools: Sequence[Mapping[str, Any]]) -> Grammar:
        """The name of one of these tools and what a call goes on with."""
        names = " | ".join(json.dumps(tool["name"]) for tool in tools)
        rule = f"start: ({names}) (<[{self.token('<arg_key>')}]> | <[{self.token('</tool_call>')}]>)"
        return Grammar(self, self._matcher.grammar_from_lark(rule), 0)

    def _call(self, rule: str, name: str, parameters: Mapping[str, Any]) -> list[str]:
        """The rules of one tool: its name, then its parameters in their order, those not required perhaps left out."""
        ids = [self.token(f"<{slash}arg_{part}>") for part in ("key", "value") for slash in ("", "/")]
        key, key_end, value, value_end = (f"<[{i}]>" for i in ids)
        known = {name: parameters[name] for name in ("$defs", "definitions") if name in parameters}
        values, schema = _Values(rule, Schema(parameters), known), Schema(parameters).resolve(parameters)
        required, others = schema.get("required") or (), schema.get("additionalProperties", True)
        properties, parts = dict(schema.get("properties") or {}), [json.dumps(name)]
        for parameter in required:
            properties.setdefault(parameter, others)
        for parameter, inner in properties.items():
            pair = f"{key} {json.dumps(parameter)} {key_end} {value} {values.rule(inner)} {value_end}"
            parts.append(pair if parameter in required else f"({pair})?")
        if not properties and others is not False:
            parts.append(f"({key} NAME {key_end} {value} {values.rule(others)} {value_end})*")
        return [*values.rules, f"{rule}: {' '.join(parts)}"]


class _Values:
    """Rules of a tool's values as GLM writes them: strings raw, all else JSON."""

    def __init__(self, name: str, root: Schema, known: Mapping[str, Any]) -> None:
        self._name, self._root, self._known = name, root, known
        self.rules = list[str]()
        self._texts = dict[int, tuple[Any, str]]()  # by schema: references lead to one on many ways, or in a circle

    def rule(self, schema: Any) -> str:
        """The name of a new rule for a schema's values."""
        types = self._root.types(schema)
        if types == TYPES:
            return self._add("TEXT")
        if types <= {"string", "null"}:
            return self._text_rule(schema)
        inner = schema if isinstance(schema, Mapping) else {}
        return self._add(f"%json {json.dumps({**self._known, **inner, 'x-guidance': _STYLE})}")

    def _add(self, body: str, terminal: bool = False) -> str:
        name = f"{self._name}_{len(self.rules)}"
        self.rules.append(f"{name.upper() if terminal else name}: {body}")
        return name.upper() if terminal else name

    def _text_rule(self, schema: Any) -> str:
        """The name of the rule of a schema that allows strings and null only."""
        found = self._root.resolve(schema)
        if id(found) not in self._texts:
            place = len(self.rules)
            self._texts[id(found)] = found, self._add("")
            self.rules[place] += self._text(schema)
        return self._texts[id(found)][1]

    def _text(self, schema: Any) -> str:
        """Of a schema that allows strings and null only."""
        found, types = self._root.resolve(schema), self._root.types(schema)
        for part in map(self._root.resolve, found.get("allOf") or ()):
            found = {**part, **found}
        if choices := [found["const"]] if "const" in found else found.get("enum"):
            return " | ".join(json.dumps(c if isinstance(c, str) else json.dumps(c)) for c in choices)
        for name in ("anyOf", "oneOf"):
            if parts := found.get(name):
                return " | ".join(map(self._text_rule, parts))
        if types == {"null"}:
            return '"null"'
        terms, (least, most) = ["TEXT"], (found.get("minLength", 0), found.get("maxLength", ""))
        terms += [] if (least, most) == (0, "") else [rf"/(.|\n){{{least},{most}}}/"]
        terms += [] if "pattern" not in found else [_searched(found["pattern"])]
        text = self._add(" & ".join(terms), terminal=True)
        return f'"null" | {text}' if "null" in types else text


def _searched(pattern: str) -> str:
    """A schema's pattern, which may match anywhere in a string, as a regular expression for all of it."""
    from llguidance import regex_to_lark

    begin, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith(r"\$")
    inner = pattern[begin : len(pattern) - end]
    if "|" in re.sub(r"\\.|\[.*?\]|\(.*\)", "", inner) and (begin or end):
        raise InputError(f"schema has pattern {pattern!r}; expected alternatives within brackets where it is anchored")
    anything = r"(.|\n)*"
    whole = f"{'' if begin else anything}({inner}){'' if end else anything}"
    return f"/{regex_to_lark(whole, 'dsw')}/"  # classes are ASCII's, as in JavaScript


def _reason(matcher: Any) -> str:
    """What a matcher says of its failure, without its state."""
    return re.split(r"<(?:state|backtrace)>", matcher.get_error())[0].strip()


class _Vocabulary:
    """The tokenizer as llguidance wants it. Markup is special to it: no text of a grammar matches its spelling."""

    bos_token_id = None

    def __init__(self, grammars: Grammars) -> None:
        self._tokenizer = grammars.tokenizer
        # A row without a token needs a name: an empty one is the beginning of all markup, and allowed where that is.
        self.tokens = [text or f"<|row {i}|>".encode() for i, text in enumerate(grammars.bytes)]
        self.eos_token_id = grammars.stop_ids[0] if grammars.stop_ids else 0
        self.special_token_ids = [i for i, text in enumerate(grammars.bytes) if i in grammars.markup or not text]

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode_plain(text.decode(errors="replace"))


class Grammar:
    """A compiled grammar. Its state is a constraint's.

    Attributes:
        longest: a bound on the bytes that opening one thing adds to the way out.
    """

    def __init__(self, grammars: Grammars, source: str, longest: int) -> None:
        self.grammars, self.longest = grammars, longest
        self.matcher = grammars._matcher(grammars._tokenizer, source, log_level=0, limits=grammars._limits)
        if self.matcher.is_error():
            raise InputError(f"schema cannot be kept to: {_reason(self.matcher)}")
        self.trouble = ""  # why the last way out was not found, if it was llguidance's limits
        if not grammars.tokenizer.is_bytes:
            self.longest *= 4  # a token may open several things

    @cached_property
    def least(self) -> int | None:
        """Tokens of the shortest reply that can be found; None if they are too many."""
        found = self.way_out(self.matcher, MOST_LEAST)
        return None if found is None else len(found)

    def way_out(self, matcher: Any, most: int, reply: Sequence[int] = ()) -> list[int] | None:
        """Tokens that complete what the matcher has seen; None if none of at most ``most`` are found.

        At a choice of few what is likely short is taken, each time the same. Where that leads in a circle (a schema
        that holds itself) the choices that came again are made otherwise, in all combinations.

        Args:
            reply: what it has seen: the way out of what stands on a way out is the rest of that.
        """
        otherwise = Counter[tuple[int, ...]]()
        for _ in range(_TRIES):
            found, choices = self._walk(matcher.deep_copy(), most, reply, otherwise)
            if found is not None:
                return found
            for those in reversed([those for those, times in choices.items() if times > 1]):
                otherwise[those] = (otherwise[those] + 1) % len(those)
                if otherwise[those]:
                    break
            else:
                return None
        return None

    def _walk(
        self, matcher: Any, most: int, reply: Sequence[int], otherwise: Mapping[tuple[int, ...], int]
    ) -> tuple[list[int] | None, Counter[tuple[int, ...]]]:
        """A way out and how often which choice was made on it."""
        found, used, made = list[int](), Counter(reply), Counter[tuple[int, ...]]()
        while len(found) <= most:
            if matcher.is_accepting():
                return found, made
            forced = matcher.compute_ff_tokens()
            if not forced:
                allowed = self.allowed(matcher)
                choices = [i for i in self.grammars.way_out if allowed[i]] or [int(allowed.argmax())]
                token = self._end(choices, [*reply[-_RUN:], *found][-_RUN:])
                if token is None and len(choices) <= _FEW:
                    made[tuple(choices)] += 1
                    token = choices[otherwise[tuple(choices)] % len(choices)]
                # Of many what came least often: any number of one letter may not lead out of a pattern.
                forced = [min(choices, key=lambda i: used[i]) if token is None else token]
            if not matcher.consume_tokens(forced):
                self.trouble = _reason(matcher)
                break
            found += forced
            used.update(forced)
        return None, made

    def _end(self, choices: Sequence[int], last: Sequence[int]) -> int | None:
        """The choice that ends something."""
        texts, quote, first = self.grammars.bytes, self.grammars.quote, choices[0]
        if len(texts[first]) > 1:  # markup
            return first
        if len(choices) > 64:  # within a string, where brackets end nothing
            return quote if quote in choices and last[-2:] != [quote] * 2 else None
        return first if texts[first] in _ENDS and last != [first] * _RUN else None

    def allowed(self, matcher: Any) -> np.ndarray:
        """bool [vocabulary]: what may come next in the grammar."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self.grammars.vocab_size, bitorder="little").astype(bool)


class Constraint:
    """Which tokens may follow those generated so far: a ``Mask`` of the sampler. One for each continuation.

    Args:
        thinking: whether the prompt ends within a thought. budget: most tokens of it, without its end; None for any
            number. There is no second thought with one. grammar: what is said behind it; None for anything.
            names: of tools that may be called in the midst of it, if there is no grammar. max_tokens: of both.

    Raises:
        InputError: the grammar needs more tokens than there are.
    """

    def __init__(
        self, grammars: Grammars, max_tokens: int, *, thinking: bool, budget: int | None = None,
        grammar: Grammar | None = None, names: Grammar | None = None,
    ) -> None:  # fmt: skip
        self._grammars, self._grammar, self._max_tokens = grammars, grammar, max_tokens
        self._names = names if grammar is None else None
        self._thinking, self._budget = thinking, max_tokens if budget is None else budget
        self._ends = [grammars.token(name) for name in ((THINK_END, CALL) if self._names else (THINK_END,)) if thinking]
        self._free_V = None if budget is None else self._all_but([grammars.token(THINK)])
        if grammar is not None:
            self._matcher, self._seen = grammar.matcher.deep_copy(), list[int]()
            if grammar.least is None:
                raise InputError(f"schema has no reply within {MOST_LEAST} tokens that is found {grammar.trouble}")
            if grammar.least > max_tokens - 1 - thinking:  # one ends the reply, one the thought
                raise InputError(f"max_tokens is {max_tokens}; expected more, the schema's least reply does not fit")
            self._budget = min(self._budget, max(0, max_tokens - grammar.least - grammar.longest - 2))
            self._safe = 0, 0  # behind so many tokens of the reply the way out was walked; up to so many it fits
            self._way: tuple[int, list[int]] | None = None  # behind so many tokens, the way that is being taken

    def __call__(self, outputs: Sequence[int]) -> Tensor | None:
        """bool [vocabulary], what may follow ``outputs``; None for anything."""
        begin = self._reply(outputs)
        if begin is None:
            return self._thought_V if len(outputs) < self._budget else self._only(self._ends[:1])
        if self._names is not None and outputs[begin - 1 : begin] == self._ends[1:]:
            return self._named(outputs[begin:])
        if self._grammar is None:
            return self._free_V
        return self._next(list(outputs[begin:]), self._max_tokens - len(outputs))

    def _reply(self, outputs: Sequence[int]) -> int | None:
        """Where the reply begins; None within thought."""
        if not self._thinking:
            return 0
        first = outputs[: self._budget + 1]  # the end is never further
        return min((first.index(i) + 1 for i in self._ends if i in first), default=None)

    @cached_property
    def _thought_V(self) -> Tensor | None:
        """Before a grammar anything but calls and the end of the reply."""
        if self._grammar is None:
            return None
        return self._all_but([*self._grammars.stop_ids, self._grammars.token(CALL)])

    def _named(self, call: Sequence[int]) -> Tensor | None:
        """What makes a call of a call that ended a thought: the name of a tool."""
        assert self._names is not None
        matcher = self._names.matcher.deep_copy()
        for token in call:
            if matcher.is_accepting():
                return self._free_V
            if not matcher.consume_token(token):
                return None  # behind an end of the reply
        return self._free_V if matcher.is_accepting() else torch.from_numpy(self._names.allowed(matcher))

    def _only(self, ids: Sequence[int]) -> Tensor:
        allowed_V = torch.zeros(self._grammars.vocab_size, dtype=torch.bool)
        allowed_V[list(ids)] = True
        return allowed_V

    def _all_but(self, ids: Sequence[int]) -> Tensor:
        return ~self._only(ids)

    def _way_out(self, reply: list[int], grammar: Grammar, most: int) -> list[int] | None:
        """The way out, if this is not on it already."""
        if self._way is not None:
            begin, way = self._way
            if begin <= len(reply) <= begin + len(way) and reply[begin:] == way[: len(reply) - begin]:
                return way[len(reply) - begin :]
        return grammar.way_out(self._matcher, most, reply)

    def _next(self, reply: list[int], left: int) -> Tensor | None:
        """What the grammar allows, with ``left`` tokens to come; only the way out if that is getting long."""
        grammar, stops = self._grammar, self._grammars.stop_ids
        assert grammar is not None
        known = len(self._seen)
        if reply[:known] != self._seen:  # drafts were rejected
            known = next(n for n, i in enumerate(self._seen) if n == len(reply) or i != reply[n])
            self._matcher.rollback(len(self._seen) - known)
            self._seen = reply[:known]
            if known < self._safe[0]:  # that was another way
                self._safe = 0, 0
            if self._way is not None and known < self._way[0]:
                self._way = None
        if not set(stops).isdisjoint(reply[known:]):
            return None  # behind the end drafts may be asked for; nothing comes of them
        if reply[known:] and not self._matcher.consume_tokens(reply[known:]):
            raise InputError(f"reply left its grammar: {_reason(self._matcher)}")
        self._seen = reply
        walked, fits = self._safe
        if not walked <= len(reply) < fits:
            most = min(left - 1, MOST_LEAST)
            out = self._way_out(reply, grammar, most)
            if out is None:  # nothing is sure of it; to look for it at every token would take too long
                self._safe, self._way = (len(reply), len(reply) + 1 + left // 2), None
            elif (spare := most - len(out) - grammar.longest) <= 0:
                self._way = len(reply), out
                return self._only(out[:1] or stops)
            else:
                # As long as it must still have been above 0: so it does not matter where the way was walked.
                self._safe, self._way = (len(reply), len(reply) + 1 + (spare - 1) // (grammar.longest + 1)), None
        allowed_V = torch.from_numpy(grammar.allowed(self._matcher))
        if self._matcher.is_error():  # it would say that the reply may end
            raise InputError(f"schema cannot be kept to: {_reason(self._matcher)}")
        if self._matcher.is_accepting():
            allowed_V[list(stops)] = True
        return allowed_V
