"""`python -m deeplabzoo.demo [MODEL…]`: a local web demo that segments images and the webcam."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeplabzoo.cli.parser import Parser, add_backend_option, add_device_option, load_named_model, run
from deeplabzoo.errors import OutputError, UsageError

if TYPE_CHECKING:
    from deeplabzoo.demo.server import DemoServer


PORT = 7860
MAX_MEGABYTES = 32.0
MAX_PIXELS = 50_000_000
MAX_QUEUED = 64
"""Images that may be queued for one model; more are refused with HTTP 503."""

_EPILOG = """\
MODEL is a model name or a checkpoint file; the page lists those named first, then the bundled models. Images stay in the \
memory of this computer: nothing is written or sent anywhere. Ctrl-C stops the demo.

examples:
  python -m deeplabzoo.demo
  python -m deeplabzoo.demo mine.safetensors --port 8000
"""


def demo_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load the named models (or the first bundled one), and serve the page until Ctrl-C."""
    args = build_parser().parse_args(argv)
    server = make_server(
        args.models,
        port=args.port,
        share_on_network=args.share_on_network,
        device=args.device,
        backend=args.backend,
        max_megabytes=args.max_megabytes,
        max_pixels=args.max_pixels,
    )
    with server:
        print(f"deeplabzoo demo: http://127.0.0.1:{server.port} (Ctrl-C stops it)", flush=True)
        if args.share_on_network:
            print("Every computer that can reach this one can use it: there is no password.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped", flush=True)
    return 0


def make_server(
    models: Sequence[str] = (),
    *,
    port: int = PORT,
    share_on_network: bool = False,
    device: str = "auto",
    backend: str = "auto",
    max_megabytes: float = MAX_MEGABYTES,
    max_pixels: int = MAX_PIXELS,
) -> "DemoServer":
    """Return a server that is bound to its port and has loaded its first models; `serve_forever` runs it.

    Args:
        models: Model names or checkpoint files; the bundled models follow them in the page's list.
        port: TCP port; 0 for any free one.
        share_on_network: Listen on all interfaces instead of 127.0.0.1.
        device: As for `Predictor`.
        backend: As `engine` of `Predictor`.
        max_megabytes: Largest upload.
        max_pixels: Largest image.

    Raises:
        UsageError: Invalid settings, or models that cannot be loaded.
        OutputError: The port is in use.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 (any that is free) to 65535, not {port}.")
    if max_megabytes <= 0 or max_pixels < 4:
        raise UsageError("--max-megabytes must be above 0 and --max-pixels at least 4.")

    from deeplabzoo.demo.app import ModelPool, bundled_models  # not for --help: torch takes seconds
    from deeplabzoo.demo.server import LOOPBACK, DemoServer, Limits
    from deeplabzoo.inference.predictor import Predictor

    def load(name: str) -> Predictor:
        return Predictor(load_named_model(name, None), device, backend, max_pixels=max_pixels)

    offered = ModelPool([*models, *bundled_models()], load, MAX_QUEUED)
    for name in offered.names[: max(1, len(set(models)))]:
        offered[name].warm()
    host = "0.0.0.0" if share_on_network else LOOPBACK
    try:
        return DemoServer(host, port, offered, Limits(round(max_megabytes * 1e6), max_pixels))
    except OSError as error:
        raise OutputError(f"Port {port} cannot be used ({error.strerror or error}); choose another with --port.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run(demo_command, argv)


def build_parser() -> Parser:
    """Return the command's argument parser."""
    parser = Parser("demo", "Segment images in the browser, on this computer.", _EPILOG)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="model name or checkpoint file (default: the bundled models)"
    )
    parser.add_argument("--port", type=int, default=PORT, help="TCP port; 0: any free one")
    parser.add_argument("--share-on-network", action="store_true", help="listen on all interfaces; there is no password")
    parser.add_argument("--max-megabytes", type=float, default=MAX_MEGABYTES, metavar="MB", help="largest upload in megabytes")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help="largest image in pixels")
    add_device_option(parser)
    add_backend_option(parser, "auto")
    return parser
