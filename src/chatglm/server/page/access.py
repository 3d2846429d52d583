"""Who may see the page: the holders of the API's keys, or, without keys, whoever reaches the address.

The key is asked for once. A browser then holds a cookie that scripts cannot read, other sites cannot send, and the key
cannot be had from. Nothing of it is kept by the server, so every replica knows it and restarts change nothing; it ends
after 30 days, or with its key.
"""

from __future__ import annotations

import hashlib
import hmac
import http.cookies
import re
import time
from collections.abc import Mapping

COOKIE = "chatglm_page"
LIFETIME_S = 30 * 86400
_VALUE = re.compile(r"(\d{1,5})\.(\d{1,15})\.([0-9a-f]{64})\Z", re.ASCII)


class PageAccess:
    """keys: key → name, as in the settings; path: where the page is."""

    def __init__(self, keys: Mapping[str, str], path: str) -> None:
        self._path = path
        self._keys = sorted((name, hashlib.sha256(key.encode()).digest()) for key, name in keys.items())

    @property
    def is_open(self) -> bool:
        """No key is needed."""
        return not self._keys

    def covers(self, path: str) -> bool:
        """Whether a path is the page's."""
        return path == self._path or path.startswith(self._path + "/")

    def asks_at(self, path: str) -> bool:
        """Whether somebody without a key may come here, to be asked for one."""
        return path in (self._path, f"{self._path}/", f"{self._path}/key")

    def number_of_key(self, key: str) -> int | None:
        """Which key it is, compared in constant time."""
        given, found = hashlib.sha256(key.encode("utf-8", "replace")).digest(), None
        for number, (_, digest) in enumerate(self._keys):
            if hmac.compare_digest(digest, given):
                found = number
        return found

    def name_of_cookie(self, header: str) -> str | None:
        """The name of the key behind a Cookie header; None where there is no valid one."""
        try:
            morsel = http.cookies.SimpleCookie(header).get(COOKIE)
        except http.cookies.CookieError:
            return None
        found = _VALUE.match(morsel.value) if morsel else None
        if found is None or int(found[1]) >= len(self._keys) or int(found[2]) < time.time():
            return None
        name, _ = self._keys[int(found[1])]
        return name if hmac.compare_digest(self._mark(int(found[1]), found[2]), found[3]) else None

    def cookie(self, number: int, *, is_secure: bool) -> str:
        """The Set-Cookie header that lets a browser in."""
        until = str(int(time.time()) + LIFETIME_S)
        value = f"{number}.{until}.{self._mark(number, until)}"
        secure = "; Secure" if is_secure else ""
        return f"{COOKIE}={value}; Path={self._path}; Max-Age={LIFETIME_S}; HttpOnly; SameSite=Strict{secure}"

    def _mark(self, number: int, until: str) -> str:
        name, digest = self._keys[number]
        return hmac.new(digest, f"chatglm page {name} {number} {until}".encode(), hashlib.sha256).hexdigest()
