"""wandb: whether a run could log in without being asked, and reach the server, found out without waiting for either."""

import netrc
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from kto_ds.config import WandbConfig
from kto_ds.doctor.findings import Finding
from kto_ds.doctor.storage import is_writable

SERVER = "https://api.wandb.ai"
REACH_SECONDS = 10.0
GOES_OFFLINE = "training would go on offline; kto-ds report --config RUN.yaml --wandb-sync uploads it later"
# Any answer of the server will do; proxies of the environment are taken.
ASK = "import sys, urllib.error, urllib.request\ntry:\n    urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))\nexcept urllib.error.HTTPError:\n    pass"


def check_wandb(settings: WandbConfig, output_dir: Path) -> Finding:
    if settings.mode == "disabled":
        return Finding("wandb", "disabled")
    if not is_writable(output_dir / "wandb"):
        return Finding("wandb", f"{output_dir / 'wandb'} cannot be written to", "warn", "see to its rights; training would go on without wandb")
    if settings.mode == "offline":
        return Finding("wandb", f"offline, in {output_dir / 'wandb'}")
    server = os.environ.get("WANDB_BASE_URL", SERVER)
    if not has_login(server):
        return Finding("wandb", f"there is no API key for {server}: {GOES_OFFLINE}", "warn", "run `wandb login`, or set WANDB_API_KEY")
    if not reaches(server, seconds=REACH_SECONDS):
        return Finding("wandb", f"{server} does not answer within {REACH_SECONDS:g} s: {GOES_OFFLINE}", "warn", "see to the network or https_proxy, or set report.wandb.mode: offline")
    return Finding("wandb", f"online: {server} answers, and there is a key for it")


def has_login(server: str) -> bool:
    """Whether wandb finds a key by itself: in its variable, or in the file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(urlsplit(server).hostname or "") is not None
    return False


def reaches(server: str, *, seconds: float) -> bool:
    """Whether a server answers. Asked by a process of its own, as looking a name up can hang beyond any time limit."""
    try:
        asked = subprocess.run([sys.executable, "-c", ASK, server, str(seconds)], timeout=seconds + 2, capture_output=True, check=False)
    except subprocess.TimeoutExpired:
        return False
    return asked.returncode == 0
