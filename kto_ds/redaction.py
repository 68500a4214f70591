"""Secrets taken out of text before it is printed or written."""

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence

HIDDEN = "[redacted]"
LEAST_CHARACTERS = 8  # of a value: shorter ones, such as `false`, stand in ordinary text
# TOKENIZERS_PARALLELISM and its like hold no secret.
SECRET_VARIABLE = re.compile(r"KEY|TOKEN(?!IZ)|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# A whole word of an option: --data.special_tokens_in_text and --batch.max_tokens_per_microbatch are none.
SECRET_OPTION = re.compile(r"--(?:[\w.-]*[._-])?(?:api_?key|key|token|secret|password|passwd|credentials?)", re.IGNORECASE)
# scheme://user:password@host, also with the one slash that is left of two in a path.
USERINFO = re.compile(r"(?<![\w+.-])([a-z][a-z0-9+.-]*:/{1,2})[^/\s@'\"]+@", re.IGNORECASE)
# ?token=value of a URL, as in signed ones.
IN_QUERY = re.compile(r"([?&](?:[\w.-]*[._-])?(?:api_?key|key|token|secret|password|passwd|credentials?|signature|sig)=)[^&\s'\"]+", re.IGNORECASE)
# What services make recognisable themselves: Hugging Face, wandb, GitHub, GitLab, AWS, Slack, OpenAI and those that follow it, JSON Web Tokens.
TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:hf|api_org)_[A-Za-z0-9]{30,}|wandb_v\d_\w{30,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}"
    r"|xox[a-z]-[\w-]{20,}|sk-(?:[a-z0-9]{2,8}-){0,2}[A-Za-z0-9]{30,}|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+)"
)


def redact(text: str) -> str:
    """Return `text` without the secrets of this process, values of secret-looking variables and options, and without what is one whoever has it."""
    for value in sorted(_secrets(os.environ, sys.argv), key=len, reverse=True):
        # A message may show a value as Python or JSON writes it.
        for written in (value, repr(value)[1:-1], ascii(value)[1:-1], json.dumps(value)[1:-1]):
            text = text.replace(written, HIDDEN)
    return TOKEN.sub(HIDDEN, IN_QUERY.sub(rf"\1{HIDDEN}", USERINFO.sub(rf"\1{HIDDEN}@", text)))


def redact_values(tree: object) -> object:
    """Return nested dicts and lists with every text in them redacted."""
    if isinstance(tree, dict):
        return {key: redact_values(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [redact_values(value) for value in tree]
    return redact(tree) if isinstance(tree, str) else tree


def secret_in(text: str) -> str | None:
    """Return in words what secret a text shows by its form, whatever the environment of this process."""
    if USERINFO.search(text) or IN_QUERY.search(text):
        return "a URL with a user name, a password or a token"
    return "an access token" if TOKEN.search(text) else None


def _secrets(environment: Mapping[str, str], argv: Sequence[str]) -> set[str]:
    found = {value for name, value in environment.items() if SECRET_VARIABLE.search(name) and not os.path.exists(value)}  # a key file's place is no secret
    return {value for value in (*found, *_option_values(argv)) if len(value) >= LEAST_CHARACTERS}


def _option_values(argv: Sequence[str]) -> Iterator[str]:
    for option, following in zip(argv, [*argv[1:], ""]):
        name, equals, value = option.partition("=")
        if SECRET_OPTION.fullmatch(name):
            yield value if equals else following
