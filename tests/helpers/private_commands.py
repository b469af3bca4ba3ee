"""Commands of a whole project, in the working directory, as a process of its own, for tests/test_privacy.py.

Reads the images in the folder photos, and the shards in the folder shards behind an address whose query is argv[1].
"""

import re
import shlex
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from mnclglf.cli import main

TINY = shlex.split(
    "--recipe quick --epochs 1 --batch-size 8 --image-size 8 --width 2 --projector-width 16 --predictor-width 8 "
    "--queue-size 16 --device cpu --loader-threads 1 --loggers tensorboard wandb mlflow"
)


SIGNATURE = sys.argv[1]


class Ranges(SimpleHTTPRequestHandler):
    """A server of files that knows ranges, and wants the signature."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if SIGNATURE not in self.path or not path.is_file():
            return self.send_error(403)
        data, wanted = path.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = data[int(wanted[1]) : int(wanted[2]) + 1] if wanted else data
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if wanted:
            first = int(wanted[1])
            self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)
        return None

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def run(*arguments: str) -> None:
    sys.argv = [str(Path.home() / "bin" / "mnclglf"), *arguments]  # as the installed command has it
    status = main([*arguments])
    assert status == 0, f"{arguments} ended with {status}"


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory="."))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"shards:http://127.0.0.1:{server.server_address[1]}/shards/train-0000.tar{SIGNATURE}"
    for dataset, out in (("folder:photos", "runs/photos"), (address, "runs/shards")):
        run("train", "--dataset", dataset, "--out", out, *TINY)
        run("quality", out, "--dataset", dataset, "--device", "cpu")
        run("embed", out, dataset, "--device", "cpu")
        run("report", out)
        run("export", out, "--formats", "safetensors", "onnx", "pt2")
        run("data", "pack", dataset, f"{out}-packed")
    run("knn", "runs/photos", "--device", "cpu")
    run("quality", "runs/photos", "--dataset", address, "--device", "cpu")
    run("report", "runs/photos", "runs/shards", "--out", "comparison.html")
