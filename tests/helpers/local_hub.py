"""The Hub's upload protocol on 127.0.0.1, as far as `create_repo` and `upload_folder` speak it; what is committed is served.

Large files go by LFS, small ones inside the commit, as on the real Hub; every answer needs a token.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

from helpers.local_server import LocalServer, Request, _Handler, local_server


class LocalHub(LocalServer):
    """`repos`: names that were created; `commits`: (repo, message, files) of each commit; `blobs`: LFS content by sha256."""

    def __init__(self) -> None:
        super().__init__()
        self.RequestHandlerClass = _HubHandler
        self.repos: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.commits: list[tuple[str, str, dict[str, bytes]]] = []
        self.cards: list[str] = []
        self.refuse_commits = False

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> str:
        """Keep the files of a commit, serve them at `main` and at its hash, and return that."""
        files = {}
        for line in lines[1:]:
            value = line["value"]
            regular = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if regular else self.blobs[value["oid"]]
        oid = hashlib.sha1(json.dumps([repo, *sorted(files)]).encode() + bytes([len(self.commits)])).hexdigest()
        self.commits.append((repo, lines[0]["value"]["summary"], files))
        for name, content in files.items():
            for revision in ("main", oid):
                self.serve_hub_file(repo, revision, name, content)
                self.files[f"/{repo}/resolve/{revision}/{name}"].headers["X-Repo-Commit"] = oid
        return oid


class _HubHandler(_Handler):
    server: LocalHub

    def do_POST(self) -> None:  # noqa: N802 - the name that the base class calls
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append(Request("POST", self.path, dict(self.headers)))
        if not self.headers.get("Authorization", "").startswith("Bearer hf_"):
            self._json(HTTPStatus.UNAUTHORIZED, {"error": "Invalid username or password."})
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = HTTPStatus.CONFLICT if name in self.server.repos else HTTPStatus.OK
            self.server.repos.add(name)
            facts = {"id": name, "sha": "0" * 40, "xetEnabled": False}  # huggingface_hub 0.30 asks whether Xet is used
            self.server.serve(f"/api/models/{name}/revision/main", json.dumps(facts).encode())
            self._json(status, {"url": f"{self.server.url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self._json(HTTPStatus.OK, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/preupload/main", path):
            files = [one["path"] for one in json.loads(body)["files"]]
            large = (".safetensors", ".png", ".jpg")
            modes = [{"path": one, "uploadMode": "lfs" if one.endswith(large) else "regular"} for one in files]
            self._json(HTTPStatus.OK, {"files": [{**one, "shouldIgnore": False, "oid": None} for one in modes]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}} for one in objects]
            answers = [{**one, "actions": action} for one, action in zip(objects, actions, strict=True)]
            self._json(HTTPStatus.OK, {"transfer": "basic", "objects": answers})
        elif (found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/commit/main", path)) and not self.server.refuse_commits:
            oid = self.server.commit(found[1], [json.loads(line) for line in body.splitlines()])
            self._json(HTTPStatus.OK, {"commitUrl": f"{self.server.url}/{found[1]}/commit/{oid}", "commitOid": oid})
        else:
            self._json(HTTPStatus.FORBIDDEN, {"error": "no"})

    def do_PUT(self) -> None:  # noqa: N802
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = content
        right = hashlib.sha256(content).hexdigest() == self.path.rpartition("/")[2]
        self._json(HTTPStatus.OK if right else HTTPStatus.BAD_REQUEST, {})

    def _json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running Hub; everything it started has ended when the block ends."""
    with local_server(LocalHub) as hub:
        yield hub
