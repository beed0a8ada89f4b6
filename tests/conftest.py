"""Set for every test, before any library reads it: nothing fetched, nothing reported, nothing written outside."""

import atexit
import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Remote code is copied there when a model loads. One folder per process: parallel workers would write the same files.
_modules = tempfile.mkdtemp(prefix="mtp_trl_modules_")
os.environ["HF_MODULES_CACHE"] = _modules
atexit.register(shutil.rmtree, _modules, ignore_errors=True)
