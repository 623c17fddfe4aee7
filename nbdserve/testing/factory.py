"""What the fixtures give: functions that make servers and images in a folder, with their types.

They are classes so that the annotations of a test can name them: ``nbd_server: ServerFactory``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from nbdserve.testing.images import free_path, make_image
from nbdserve.testing.start import Settings, serving

if TYPE_CHECKING:
    import os
    import pathlib

    from nbdserve.testing.images import Placed
    from nbdserve.testing.inprocess import InProcess
    from nbdserve.testing.process import Process
    from nbdserve.testing.served import Served
    from nbdserve.testing.start import Image

__all__ = ["ImageFactory", "ServerFactory"]


class ServerFactory:
    """``nbd_server(size="1G")``: a server that is started, by all arguments of `serving`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self.started: list[Served] = []

    @overload
    def __call__(
        self,
        image: Image | None = None,
        *,
        process: Literal[False] = False,
        **settings: Unpack[Settings],
    ) -> InProcess: ...

    @overload
    def __call__(
        self, image: Image | None = None, *, process: Literal[True], **settings: Unpack[Settings]
    ) -> Process: ...

    @overload
    def __call__(
        self, image: Image | None = None, *, process: bool, **settings: Unpack[Settings]
    ) -> Served: ...

    def __call__(
        self, image: Image | None = None, *, process: bool = False, **settings: Unpack[Settings]
    ) -> Served:
        settings.setdefault("folder", self._folder)
        server = serving(image, process=process, **settings)
        self.started.append(server)  # also for what it logs if it does not start
        return server.start()

    def stop(self) -> None:
        """All of them, the last first. Raises what they raise, once all have stopped."""
        errors = []
        for server in reversed(self.started):
            try:
                server.stop()
            except Exception as error:  # the others are to stop as well
                errors.append(error)
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise ExceptionGroup("servers that did not stop as they should", errors)


class ImageFactory:
    """``qcow2_image("1G", content={0: random("1M")})``: the path of an image that is made, by all
    arguments of `make_image`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder

    def __call__(
        self,
        size: int | str | None = None,
        *,
        name: str | None = None,
        content: Placed | bytes | None = None,
        backing: str | os.PathLike[str] | None = None,
        backing_format: str = "qcow2",
        **options: Any,  # noqa: ANN401 - those of NewImageOptions
    ) -> pathlib.Path:
        """`name`: the file's."""
        path = self._folder / name if name else free_path(self._folder, "image", ".qcow2")
        make_image(
            path, size, content=content, backing=backing, backing_format=backing_format, **options
        )
        return path
