"""`python -m deeplabzoo.demo [MODEL…]`: a page in the browser that labels photos and the webcam's picture, on this computer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deeplabzoo.cli.parser import Parser, add_device_option, run
from deeplabzoo.errors import OutputError, UsageError
from deeplabzoo.hub.factory import load_named_model

if TYPE_CHECKING:
    from deeplabzoo.demo.server import DemoServer


PORT = 7860
MAX_MEGABYTES = 32.0
MAX_PIXELS = 50_000_000
MAX_QUEUED = 64
"""Photos that may wait for one model; more are turned away with a sentence."""

_EPILOG = """\
MODEL is a name of the zoo or a checkpoint file; those named stand first in the page's list, the bundled ones after them.
Photos stay in this computer's memory: nothing is written, counted or sent anywhere. Ctrl-C ends the demo.

examples:
  python -m deeplabzoo.demo
  python -m deeplabzoo.demo mine.safetensors --port 8000
"""


def demo_command(argv: Sequence[str] | None = None) -> int:
    """Parse the command line, load what was named (or the first bundled model), and serve the page until Ctrl-C."""
    args = _parser().parse_args(argv)
    server = make_server(
        args.models,
        port=args.port,
        share_on_network=args.share_on_network,
        device=args.device,
        engine=args.engine,
        max_megabytes=args.max_megabytes,
        max_pixels=args.max_pixels,
    )
    with server:
        print(f"deeplabzoo demo: http://127.0.0.1:{server.port} (Ctrl-C ends it)", flush=True)
        if args.share_on_network:
            print("Every computer that reaches this one can use it: there is no password.", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("ended", flush=True)
    return 0


def make_server(
    models: Sequence[str] = (),
    *,
    port: int = PORT,
    share_on_network: bool = False,
    device: str = "auto",
    engine: str = "auto",
    max_megabytes: float = MAX_MEGABYTES,
    max_pixels: int = MAX_PIXELS,
) -> "DemoServer":
    """Return a server that is bound to its port and has its first models warm; `serve_forever` runs it.

    Port 0 takes any that is free. Raises UsageError for settings that make no sense, OutputError for a port that is taken,
    and what loading the models raises.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port must be from 0 (any that is free) to 65535, not {port}.")
    if max_megabytes <= 0 or max_pixels < 4:
        raise UsageError("--max-megabytes must be above 0 and --max-pixels at least 4.")

    from deeplabzoo.demo.app import ModelPool, bundled_models  # not for --help: torch takes seconds
    from deeplabzoo.demo.server import LOOPBACK, DemoServer, Limits
    from deeplabzoo.inference.predictor import Predictor

    def load(name: str) -> Predictor:
        return Predictor(load_named_model(name, None), device, engine, max_pixels=max_pixels)

    offered = ModelPool([*models, *bundled_models()], load, MAX_QUEUED)
    for name in offered.names[: max(1, len(set(models)))]:
        offered[name].warm()
    host = "0.0.0.0" if share_on_network else LOOPBACK
    try:
        return DemoServer(host, port, offered, Limits(round(max_megabytes * 1e6), max_pixels))
    except OSError as error:
        raise OutputError(f"Port {port} cannot be used ({error.strerror or error}); choose another with --port.") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0 ended, 1 the work failed, 2 the call was wrong."""
    return run(demo_command, argv)


def _parser() -> Parser:
    parser = Parser("demo", "Label photos in the browser, on this computer.", _EPILOG)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="a name of the zoo or a checkpoint file (default: bundled)")
    parser.add_argument("--port", type=int, default=PORT, help=f"port of 127.0.0.1 (default {PORT}; 0: any that is free)")
    parser.add_argument("--share-on-network", action="store_true", help="listen to other computers, too; there is no password")
    parser.add_argument(
        "--max-megabytes", type=float, default=MAX_MEGABYTES, metavar="MB", help=f"largest upload (default {MAX_MEGABYTES:g})"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"largest photo (default {MAX_PIXELS // 10**6} million)"
    )
    add_device_option(parser)
    parser.add_argument("--engine", default="auto", help="auto (default), torch, compiled, onnxruntime or openvino")
    return parser
