"""``gptconvert web``."""

from __future__ import annotations

import signal

import click

from gptconvert.cli.options import DEBUG, JSON, QUIET, Command, own, quieten
from gptconvert.cli.output import emit, human_bytes, note, print_json, table

PAGE = "Page"
#: Port of ``--serve`` without a value.
PORT = 8000
EPILOG = """\b
Writes index.html and web/ into DIRECTORY, or replaces those of an earlier
run. Any static host can serve the directory; the model runs in the browser.
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("directory", type=click.Path())
@own(
    "--runtime-from",
    "node_modules",
    type=click.Path(),
    metavar="NODE_MODULES",
    group=PAGE,
    help="Copy the JavaScript libraries from this folder of npm, so that the page needs no network. Otherwise it "
    "loads them from a public CDN and checks their digests.",
)
@own(
    "--serve",
    "port",
    type=click.IntRange(0, 65535),
    is_flag=False,
    flag_value=PORT,
    metavar="[PORT]",
    group=PAGE,
    help=f"Serve the page on this machine until Ctrl-C, on port {PORT} unless another is given; 0 takes a free one.",
)
@own("--force", is_flag=True, group=PAGE, help="Replace an index.html or a web/ that gptconvert did not write.")
@JSON
@QUIET
@DEBUG
def web(
    directory: str, node_modules: str | None, port: int | None, force: bool, as_json: bool, quiet: bool
) -> int | None:
    """Add a page to an export that writes with the model in the browser.

    DIRECTORY holds ONNX graphs and a tokenizer. The page continues a text with three alternatives to choose from,
    shades every token by its probability, and shows how the export was verified. Text and model stay on the device.
    """
    quieten()
    from gptconvert.publish.signals import Interrupted
    from gptconvert.web.publish import publish
    from gptconvert.web.server import Server

    server = None if port is None else Server(directory, port)  # before writing: the port may be in use
    site = publish(directory, node_modules, force=force)
    for each in site.notes:
        note(each, quiet)
    if as_json:
        print_json(
            {
                "ok": True,
                "output": directory,
                "files": [{"path": path, "size": size} for path, size in sorted(site.files.items())],
                "variants": [{key: each[key] for key in ("name", "size")} for each in site.document["variants"]],
                "url": server and server.url,
            }
        )
    else:
        emit(table([(path, human_bytes(size)) for path, size in sorted(site.files.items())], right=(1,)))
    if server is None:
        return None
    if not as_json:
        emit(f"\nOpen {server.url} in a browser; Ctrl-C ends the server.")
    try:
        server.serve_forever()
    except Interrupted as error:
        return 0 if error.signum == signal.SIGINT else 128 + error.signum
    finally:
        server.server_close()
    return None
