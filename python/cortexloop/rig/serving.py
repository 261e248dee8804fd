"""From a configuration to a session that is served: what `cortexloop serve` does."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Literal

from cortexloop.realtime.messages import StatusReply
from cortexloop.realtime.session import Session
from cortexloop.rig.config import RigConfig, build
from cortexloop.rig.folder import FolderRig
from cortexloop.rig.server import Server

log = logging.getLogger("cortexloop.rig")

Begin = Literal["either", "new", "resume"]


def open_session(config: RigConfig, begin: Begin = "either") -> tuple[Session, bool]:
    """The session in the configuration's folder, and whether it goes on from a journal there.

    Args:
        config: what to make.
        begin: "new" and "resume" insist on one; "either" resumes if there is a journal.

    Raises:
        FileExistsError: a session is there, and a new one was asked for. FileNotFoundError: there is none to resume.
        JournalError, ResumeError: see `Session`. ValueError, OSError: see `build`.
    """
    there = (config.folder / "session.rigj").exists()
    if there and begin == "new":
        raise FileExistsError(f"{str(config.folder)!r} has a session; resume it, or name another folder")
    if not there and begin == "resume":
        raise FileNotFoundError(f"{str(config.folder)!r} has no session to resume")
    sources, references = build(config)
    make = Session.resume if there else Session.create
    return make(config.folder, config.settings, sources, references, config=config.kept), there


class Service:
    """A session with its server, and its folders if the configuration has any.

    Args:
        config: where to listen.
        session: closed by `run`.
        on_status: called about every second, in the server's thread, with the session's state.
        until_finished: stop when the session is over.

    Raises:
        ValueError, OSError: see `Server`.
    """

    def __init__(
        self,
        config: RigConfig,
        session: Session,
        *,
        on_status: Callable[[StatusReply], None] | None = None,
        until_finished: bool = False,
    ) -> None:
        self.config, self.session = config, session
        self._on_status, self._until_finished = on_status, until_finished
        table = config.server
        self.server = Server(
            session,
            zmq=table.zmq or None,
            tcp=table.tcp or None,
            secret=config.secret(),
            insecure=table.insecure,
            limits=table.limits,
            tick=self._look,
        )
        self._stop = threading.Event()

    def stop(self) -> None:
        """Let `run` return; from any thread or signal handler."""
        self._stop.set()
        self.server.stop()

    def run(self) -> None:
        """Serve until `stop`, or until the session is over if so asked; then close everything in good order."""
        folders = None
        if self.config.exchange is not None:
            folders = threading.Thread(target=self._serve_folders, name="cortexloop-folders")
            folders.start()
        try:
            self.server.run()
        finally:
            self._stop.set()
            if folders is not None:
                folders.join()
            self.session.close()

    def _serve_folders(self) -> None:
        table = self.config.exchange
        assert table is not None
        try:
            rig = FolderRig(
                self.server.local("folder"),
                self.config.resolve(table.images),
                None if table.scores is None else self.config.resolve(table.scores),
                image_format=table.image_format,
                units=table.units,
                settle_s=table.settle_ms / 1e3,
            )
            rig.run(self._stop, table.poll_ms / 1e3)
        except Exception:
            log.exception("the folders are not served any more; the server goes on without them")

    def _look(self) -> None:
        status = self.session.status()
        if self._on_status is not None:
            self._on_status(status)
        if self._until_finished and status.state == "finished":
            self.stop()
