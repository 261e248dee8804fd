"""The command `cortexloop serve`: a session for rigs."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from cortexloop.cli.console import BadInputError, bad_input, sentence, stdout, telling_interruptions

if TYPE_CHECKING:
    from cortexloop.realtime.messages import StatusReply
    from cortexloop.rig.serving import Service


@telling_interruptions()
def serve(
    config: Annotated[Path, typer.Argument(help="Configuration of the session, a TOML file.")],
    new: Annotated[bool, typer.Option("--new", help="Begin a session; an error if there is one.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a session; an error if there is none.")] = False,
    until_finished: Annotated[
        bool, typer.Option("--until-finished", help="End when every stream has shown and learned all it had.")
    ] = False,
) -> None:
    """Serve a session to a rig until Ctrl-C: a new one, or the one in its folder from where it was."""
    from cortexloop.realtime.journal import JournalError
    from cortexloop.realtime.state import ResumeError
    from cortexloop.rig.config import load
    from cortexloop.rig.serving import Service, open_session

    if new and resume:
        raise BadInputError("--new and --resume exclude each other")
    try:
        with bad_input():
            found = load(config)
            found.secret()  # before models are loaded
            session, resumed = open_session(found, "new" if new else "resume" if resume else "either")
    except (JournalError, ResumeError) as error:
        raise BadInputError(sentence(error)) from error
    try:
        with bad_input():
            service = Service(found, session, on_status=_Line(), until_finished=until_finished)
    except BaseException:
        session.close()
        raise
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    before = {s: signal.signal(s, lambda *_: service.stop()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        _tell_where(service, resumed)
        service.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    stdout().print(f"closed; go on with: cortexloop serve {escape(str(config))}", soft_wrap=True)


def _tell_where(service: Service, resumed: bool) -> None:
    console, config, server = stdout(), service.config, service.server
    console.print(
        f"session {escape(config.settings.session)} {'resumed from' if resumed else 'begun in'} "
        f"{escape(str(config.folder))}",
        soft_wrap=True,
    )
    for transport, address in (("ZeroMQ", server.zmq_address), ("TCP", server.tcp_address)):
        if address is not None:
            console.print(f"listening on {address} ({transport})", soft_wrap=True)
    if config.exchange is not None:
        console.print(f"exchanging files in {escape(str(config.resolve(config.exchange.images)))}", soft_wrap=True)


class _Line:
    """One line on a terminal, written over each time; elsewhere one for each change but the count of responses."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, status: StatusReply) -> None:
        console = stdout()
        streams = ", ".join(
            f"{s.name} generation {s.generation}" + ("" if s.mean is None else f" mean {s.mean:.3g} best {s.best:.3g}")
            for s in status.streams
        )
        parts = [status.state + (f" ({status.text})" if status.text else ""), streams]
        for count, word in ((status.reshown, "shown again"), (status.deadline_misses, "deadlines missed")):
            parts += [f"{count} {word}"] if count else []
        lost = [link.client for link in status.links if link.stale]
        parts += [f"not heard: {', '.join(lost)}"] if lost else []
        line, told = "; ".join(parts), f"; {status.told} responses"
        if console.is_terminal:
            console.print(escape((line + told)[: console.width - 1].ljust(console.width - 1)), end="\r")
        elif line != self._last:
            self._last = line
            console.print(escape(line + told), soft_wrap=True)
