"""Images from the web, bounded in size and time; nothing is kept."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.request
from typing import Any

from huggingface_hub import constants

from ..._errors import ImageError
from ..._version import __version__

MAX_BYTES = 64 * 2**20
TIMEOUT = 30.0  # seconds without a byte
MAX_SECONDS = 120.0  # in all


def fetch_image(url: str) -> bytes:
    """The body of an http or https URL.

    Raises:
        ImageError: offline mode is on (HF_HUB_OFFLINE), or the server cannot be reached, refuses, is too slow, or sends
            more than MAX_BYTES or nothing.
    """
    if constants.HF_HUB_OFFLINE:
        raise ImageError(
            f"{url} was not asked for, because offline mode is on (HF_HUB_OFFLINE); unset it, or give a saved image"
        )
    until = time.monotonic() + MAX_SECONDS
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"segzoo/{__version__}"})
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            return _body(response, url, until)
    except ImageError:
        raise
    except urllib.error.HTTPError as error:
        error.close()
        raise ImageError(f"{url}: the server answered {error.code} {error.reason}; check the address") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: no host, or none that can be
        reason = getattr(error, "reason", None) or error
        raise ImageError(f"{url} cannot be fetched ({reason}); check the address, or save the image first") from error


def _body(response: Any, url: str, until: float) -> bytes:
    chunks, size = [], 0
    while chunk := response.read1(2**16):  # what has arrived, so that the clock is looked at
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_BYTES:
            raise ImageError(f"{url} is larger than {MAX_BYTES:,} bytes; save the image and give its file")
        if time.monotonic() > until:
            raise ImageError(f"{url} took more than {MAX_SECONDS:.0f} seconds; save the image and give its file")
    if not chunks:
        raise ImageError(f"{url} sent nothing; check the address")
    return b"".join(chunks)
