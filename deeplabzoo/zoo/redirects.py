"""Where a web server may send a download on to."""

import urllib.request
from typing import IO, Any

from deeplabzoo.errors import DownloadError


class SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to web servers, but never from https to anything weaker; a question (HEAD) stays one."""

    def http_error_302(self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any) -> Any:
        """Ask where the answer points to; no connection stays open where that cannot be."""
        try:
            return super().http_error_302(req, fp, code, msg, headers)
        except BaseException:
            fp.close()
            raise

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> Any:
        """Return the request that follows a redirect; raises DownloadError for one that leaves https, or the web."""
        safe = "https" if req.full_url.startswith("https:") else "http"
        if not newurl.startswith(("https:", f"{safe}:")):
            raise DownloadError(f"{req.full_url} redirects to {newurl}, which is not {safe}; the download was refused.")
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following is not None and req.get_method() == "HEAD":
            following.method = "HEAD"
        return following
