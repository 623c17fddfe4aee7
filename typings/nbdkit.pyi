# The module that nbdkit makes for its Python plugins (nbdkit-python-plugin(3), "Module functions"
# and "Module constants"); it exists in nbdkit's own process alone.

THREAD_MODEL_PARALLEL: int
FLAG_MAY_TRIM: int
FLAG_FUA: int
FLAG_REQ_ONE: int
FLAG_FAST_ZERO: int
FUA_NATIVE: int
CACHE_NATIVE: int
EXTENT_HOLE: int
EXTENT_ZERO: int

def debug(msg: str) -> None: ...
def export_name() -> str: ...
def set_error(err: int) -> None: ...
