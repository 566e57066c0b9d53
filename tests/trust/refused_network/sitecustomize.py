"""A Python whose every way to the network is shut: what tries is written down in $REFUSED_ATTEMPTS and refused.

Python imports this by itself where its folder is in PYTHONPATH, so every process that a program starts is held to it as well.
Audit events come from the interpreter's own socket module, so no library goes around them; sockets between processes of this
computer (AF_UNIX) are let through.
"""

import os
import sys

_ASKED = {
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.sendto",
    "socket.sendmsg",
}


def _refuse(event: str, arguments: tuple[object, ...]) -> None:
    if event not in _ASKED:
        return
    place = arguments[0] if event.startswith("socket.get") else arguments[1]
    if place is None or (isinstance(place, str | bytes) and not event.startswith("socket.get")):
        return
    file = os.open(os.environ["REFUSED_ATTEMPTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(file, f"{event} {place}: {' '.join(sys.argv)[:200]}\n".encode())
    os.close(file)
    raise OSError(101, "the network is refused")


sys.addaudithook(_refuse)
