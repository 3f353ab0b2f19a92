"""A line to people, where a webhook is given: Slack's JSON, which Mattermost, Rocket.Chat, Google Chat and others take too."""

import json
import os
import ssl
import threading
import urllib.request
from typing import Any
from urllib.error import HTTPError

import certifi

from components import say

WEBHOOK = "FFN_WEBHOOK"
"""Variable with its address. Who knows that may write there: on a cluster it comes from a Secret, and it is never printed."""

SECONDS = 10.0
"""How long the webhook may take, the name of its host and all."""


def notify(text: str) -> None:
    """Send `text`, if there is a webhook. A webhook that fails is said in a line: nothing fails for the want of a message."""
    if not (url := os.environ.get(WEBHOOK, "")):
        return
    ended: list[str] = []
    thread = threading.Thread(
        target=lambda: ended.append(_send(url, text)), daemon=True
    )  # it may hang where nothing has a time limit
    thread.start()
    thread.join(SECONDS)
    if trouble := ended[0] if ended else f"gives no answer within {SECONDS:g} s":
        say(f"nobody was notified: the webhook {trouble}")


def _send(url: str, text: str) -> str:
    """What went wrong, without the words of errors: they hold the address."""
    if not url.startswith(("http://", "https://")):
        return f"in {WEBHOOK} is no http address"
    for mark, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):  # Slack's three: else an error's text may call a channel
        text = text.replace(mark, escaped)
    try:
        request = urllib.request.Request(url, json.dumps({"text": text}).encode(), {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(_Straight, urllib.request.HTTPSHandler(context=_trusted()))
        with opener.open(request, timeout=SECONDS):
            return ""
    except HTTPError as error:
        error.close()
        return f"answers {error.code}"
    except Exception as error:
        return f"does not answer ({type(getattr(error, 'reason', error)).__name__})"


class _Straight(urllib.request.HTTPRedirectHandler):
    """To be sent elsewhere is no success: what is posted would arrive as a GET."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _trusted() -> ssl.SSLContext:
    """The public authorities, and those of the cluster: the webhook may be anybody's."""
    context = ssl.create_default_context(cafile=certifi.where())
    if own := os.environ.get("REQUESTS_CA_BUNDLE"):
        context.load_verify_locations(own)
    return context
