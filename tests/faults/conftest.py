"""What these tests share."""

from rank_fixtures import no_server_left  # noqa: F401
