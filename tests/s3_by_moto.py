"""moto's S3 server of the files in a folder, whose first folders are its buckets.

    python tests/s3_by_moto.py FOLDER PORT

It has its objects in memory, and puts them there before it takes requests: one that is killed and started again has
them as before, and is never seen without them. Of the same content it says the same ETag.
"""

import logging
import sys
from pathlib import Path

from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server


def fill(folder: Path) -> None:
    """Put the files into buckets."""
    store = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    for bucket in sorted(path for path in folder.iterdir() if path.is_dir()):
        store.create_bucket(bucket.name, "us-east-1")
        for file in sorted(path for path in bucket.rglob("*") if path.is_file()):
            store.put_object(bucket.name, file.relative_to(bucket).as_posix(), file.read_bytes())


if __name__ == "__main__":
    fill(Path(sys.argv[1]))
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", int(sys.argv[2]), app, threaded=True)
    print("ready", flush=True)
    server.serve_forever()
