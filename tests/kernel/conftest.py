"""One guest for all tests of this folder that leave it alive."""

import pytest

from kernel.guest import Guest, started


class _Guests:
    """Boots the first, and another one when a test has broken the one there was."""

    def __init__(self) -> None:
        self._context = None
        self._guest: Guest | None = None

    def healthy(self) -> Guest:
        if self._guest is None or self._guest.broken:
            self.close()
            self._context = started()
            self._guest = self._context.__enter__()
        return self._guest

    def close(self) -> None:
        context, self._context, self._guest = self._context, None, None
        if context is not None:
            context.__exit__(None, None, None)


@pytest.fixture(scope="session")
def guests():
    all_guests = _Guests()
    yield all_guests
    all_guests.close()


@pytest.fixture
def guest(guests, request):
    """A guest without attached devices. After a test that failed it is not used again."""
    guest = guests.healthy()
    failures = request.session.testsfailed
    yield guest
    if request.session.testsfailed != failures:
        guests.close()
