"""Token ids of records. The completion starts where the tokens of the prompt and of the whole text part ways."""

import contextlib
import os
import re
import signal
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kto_ds.errors import UserError, excerpt, untrusted_code
from kto_ds.rows.records import Messages, Record

# A chat template is a program from elsewhere; these bounds are far beyond what an honest one needs for one row.
MAX_TEMPLATE_SECONDS = 10.0
MAX_RENDERED_CHARACTERS = 1 << 26
PROBE = ["", "a", "Two  words,\tone\n line. ", " déjà vu 漢字 🙂", "<s> x </s> <|im_start|>y<|im_end|>\n"]

Encode = Callable[[list[str], bool], list[list[int]]]  # (texts, whether to add special tokens) -> ids


class TextRules(NamedTuple):
    """How text becomes tokens, the tokenizer apart."""

    append_eos: bool = True  # plain text only: a chat template ends its turns itself
    special_tokens_in_text: Literal["warn", "error"] = "warn"
    chat_template_kwargs: dict | None = None  # for every row of messages; a row's own go before


class RowTokens(NamedTuple):
    prompt_ids: np.ndarray  # [prompt tokens] int32
    completion_ids: np.ndarray  # [completion tokens] int32
    boundary_merged: bool  # the completion begins inside what is the prompt's last token when it stands alone
    has_special_text: bool  # the text of the row spells a special token


def load_tokenizer(path: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """Return the tokenizer that lies at `path`, a folder or a hub name."""
    remedy = "give a folder with tokenizer files, or a hub name"
    if path.startswith(("/", "./", "../", "~")) and not os.path.isdir(path):
        raise UserError(f"cannot load the tokenizer {excerpt(path)}: no such folder", where="model.path", remedy=remedy)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        # Damaged tokenizer files surface as KeyError, AttributeError or a bare Exception, not only as OSError and ValueError.
        if "trust_remote_code" in str(error):
            raise untrusted_code("tokenizer", path, where="model.path") from error
        found = f"{type(error).__name__}: {excerpt(str(error), limit=400)}"
        raise UserError(f"cannot load the tokenizer {excerpt(path)}: {found}", where="model.path", remedy=remedy) from error
    if tokenizer.eos_token_id is None:
        what = f"the tokenizer {excerpt(tokenizer.name_or_path)} has no eos_token"
        raise UserError(what, where="model.path", remedy="set eos_token in its tokenizer_config.json")
    return tokenizer


class RowTokenizer:
    """One tokenizer with what is derived from it once a process."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, rules: TextRules = TextRules()):
        self.tokenizer, self.rules = tokenizer, rules
        self._encode = _encoder(tokenizer)
        _require_no_clock(tokenizer, rules)
        added = tokenizer.added_tokens_decoder
        self._special_text = _any_of({token.content for token in added.values() if token.special} | set(tokenizer.all_special_tokens))
        # Text is cut at these before anything else is done to it, so that what lies before one does not depend on what follows.
        cuts = {
            number: token.content
            for number, token in added.items()
            if token.special and not (token.normalized or token.lstrip or token.rstrip or token.single_word) and number != tokenizer.unk_token_id
        }
        self._cut_ids, self._cut_text = np.array(sorted(cuts), dtype=np.int32), _any_of(set(cuts.values()))

    def tokenize(self, records: list[Record]) -> list[RowTokens | UserError]:
        """Return each record's tokens, or why it has none, in order."""
        rendered = [(record, self._render(record)) for record in records]
        whole_ids = self._encode_all([(record, pair[1]) for record, pair in rendered if not isinstance(pair, UserError)])
        prompt_ids = self._prompt_ids([(record, *pair) for record, pair in rendered if not isinstance(pair, UserError)], whole_ids)
        encoded = iter(zip(prompt_ids, whole_ids))
        return [pair if isinstance(pair, UserError) else self._row(record, *next(encoded)) for record, pair in rendered]

    def _render(self, record: Record) -> tuple[str, str] | UserError:
        """Return the text of the prompt and of prompt and completion."""
        if self.rules.special_tokens_in_text == "error" and (found := self._find_special(record)):
            remedy = "remove it from the row, or set data.special_tokens_in_text: warn"
            return UserError(f"the text spells the special token {excerpt(found)}", where=record.where, remedy=remedy)
        if isinstance(record.prompt, str):
            return record.prompt, record.prompt + record.completion
        if not self.tokenizer.chat_template:
            remedy = "add a chat_template.jinja to the tokenizer's folder, or give prompt and completion as plain text"
            what = f"a row of messages needs a chat template, and the tokenizer {excerpt(self.tokenizer.name_or_path)} has none"
            return UserError(what, where=record.where, remedy=remedy)
        options = {**(self.rules.chat_template_kwargs or {}), **(record.template_kwargs or {})}
        try:
            with _time_limit(MAX_TEMPLATE_SECONDS):
                prompt = self._apply_template(record, record.prompt, {**options, "add_generation_prompt": True})
                whole = self._apply_template(record, record.prompt + record.completion, options)
                if not whole.startswith(prompt) and not whole.startswith(self._apply_template(record, record.prompt, options)):
                    # The ids would part ways inside the prompt, and the completion would begin with the user's own words.
                    raise ValueError("it renders the prompt in another way once an answer follows")
        except Exception as error:
            # A chat template may raise anything, and its message is what the user needs.
            what = f"the chat template refuses the row: {type(error).__name__}: {excerpt(str(error), limit=400)}"
            return UserError(what, where=record.where, remedy="mend the row, or use a chat template that renders it")
        return prompt, whole

    def _apply_template(self, record: Record, messages: Messages, options: dict) -> str:
        text = self.tokenizer.apply_chat_template(messages, tools=record.tools, tokenize=False, **options)
        if len(text) > MAX_RENDERED_CHARACTERS:
            raise ValueError(f"it makes {len(text)} characters of one row, more than {MAX_RENDERED_CHARACTERS}")
        return text

    def _encode_all(self, texts: list[tuple[Record, str]]) -> list[np.ndarray]:
        """Encode every text once, plain ones with the tokenizer's special tokens, rendered ones without."""
        keys = [(isinstance(record.prompt, str), text) for record, text in texts]
        ids_of: dict[tuple[bool, str], np.ndarray] = {}
        for is_plain in (True, False):
            distinct = list(dict.fromkeys(key for key in keys if key[0] is is_plain))
            found = self._encode([text for _, text in distinct], is_plain)
            ids_of.update(zip(distinct, (np.array(ids, dtype=np.int32) for ids in found)))
        return [ids_of[key] for key in keys]

    def _prompt_ids(self, rows: list[tuple[Record, str, str]], whole_ids: list[np.ndarray]) -> list[np.ndarray]:
        """Return the ids of every prompt as it stands alone; those before the prompt's last special token are taken from the whole."""
        places = [self._last_cut(*row, ids) for row, ids in zip(rows, whole_ids)]
        rests = self._encode_all([(record, prompt[place[0] :] if place else prompt) for (record, prompt, _), place in zip(rows, places)])
        return [np.concatenate([whole[: place[1]], rest]) if place else rest for place, whole, rest in zip(places, whole_ids, rests)]

    def _last_cut(self, record: Record, prompt: str, whole: str, whole_ids: np.ndarray) -> tuple[int, int] | None:
        """Return where the prompt's last special token stands, (character in the text, index in the ids), or None where that is not sure."""
        if isinstance(record.prompt, str) or not whole.startswith(prompt):
            return None
        cuts = [match.span() for match in self._cut_text.finditer(whole)]
        indices = np.flatnonzero(np.isin(whole_ids, self._cut_ids))
        number = sum(end <= len(prompt) for _, end in cuts) - 1
        return (cuts[number][0], int(indices[number])) if len(cuts) == len(indices) and number >= 0 else None

    def _row(self, record: Record, prompt_ids: np.ndarray, whole_ids: np.ndarray) -> RowTokens | UserError:
        eos = np.int32(self.tokenizer.eos_token_id)
        if isinstance(record.prompt, str) and self.rules.append_eos and (not len(whole_ids) or whole_ids[-1] != eos):
            whole_ids = np.append(whole_ids, eos)
        boundary = _common_length(prompt_ids, whole_ids)
        if boundary == 0:
            return UserError("no token of the prompt is left before the completion", where=record.where, remedy="end the prompt on a token boundary")
        if boundary == len(whole_ids):
            what = f"no token of the completion is left after the prompt: {excerpt(record.completion)}"
            return UserError(what, where=record.where, remedy="check that the chat template renders the last turn")
        if prompt_ids[-1] == eos:  # a tokenizer that ends every text has ended the prompt alone too
            prompt_ids = prompt_ids[:-1]
        return RowTokens(whole_ids[:boundary], whole_ids[boundary:], boundary < len(prompt_ids), self._find_special(record) is not None)

    def _find_special(self, record: Record) -> str | None:
        """Return the first special token that the row's own text spells; an end-of-text token that ends a plain completion is meant."""
        parts = list(texts_of(record))
        if isinstance(record.prompt, str):
            parts[-1] = parts[-1].removesuffix(self.tokenizer.eos_token)
        found = next((match for text in parts if (match := self._special_text.search(text))), None)
        return found and found[0]


def _require_no_clock(tokenizer: PreTrainedTokenizerBase, rules: TextRules) -> None:
    """Refuse a chat template that would write today's date: the tokens would be others tomorrow, in the middle of a run that is taken up again."""
    templates = tokenizer.chat_template.values() if isinstance(tokenizer.chat_template, dict) else [tokenizer.chat_template or ""]
    if any("strftime_now" in template for template in templates) and "date_string" not in (rules.chat_template_kwargs or {}):
        what = f"the chat template of {excerpt(tokenizer.name_or_path)} writes the date of today, so that its tokens change every day"
        remedy = 'set data.chat_template_kwargs: {date_string: "26 Jul 2024"}, or use a chat template without strftime_now'
        raise UserError(what, where="data.chat_template_kwargs", remedy=remedy)


def texts_of(record: Record) -> Iterator[str]:
    """Yield every text that a record brings to the tokenizer or the chat template, the completion's last."""
    pending: list[object] = [record.tools, record.template_kwargs, record.prompt, record.completion][::-1]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict):
            pending += [*part.keys(), *part.values()][::-1]
        elif isinstance(part, list):
            pending += part[::-1]


def _any_of(texts: set[str]) -> re.Pattern:
    """Return a pattern of the leftmost, longest of the texts, as the tokenizer looks for them; of none, a pattern that never fits."""
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)) or r"(?!)")


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Return the fastest way to ids: the Rust backend without offsets (30 % faster) when it agrees with the tokenizer itself."""

    def through_tokenizer(texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"] if texts else []

    def through_backend(texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]

    if not tokenizer.is_fast:
        return through_tokenizer
    through_tokenizer(PROBE, True)  # sets the backend's truncation and padding to none
    backend = tokenizer.backend_tokenizer
    agree = all(through_backend(PROBE, special) == through_tokenizer(PROBE, special) for special in (True, False))
    return through_backend if agree else through_tokenizer


def _common_length(left: np.ndarray, right: np.ndarray) -> int:
    """Return how many leading ids two sequences share."""
    shorter = min(len(left), len(right))
    differs = left[:shorter] != right[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError when the block takes longer; it only works in the main thread, where both prepare and its workers run this."""

    def stop(signum, frame):
        raise TimeoutError(f"it took more than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
