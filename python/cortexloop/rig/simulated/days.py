"""How a day at a simulated rig goes: timing of stimuli, clocks, and all that goes wrong."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Day:
    """One day. Shares are of presentations or messages, from 0 to 1; `..._every`: once in so many batches, 0 never.

    Attributes:
        on_ms, off_ms, trial_images, pause_ms: images are shown for on_ms with off_ms between them, in trials of so many
            with a pause between trials.
        refresh_hz: of the display.
        display_ppm, acquisition_ppm: how much faster than the server's clock those clocks run.
        light_ms, light_jitter_ms: from flip to light, mean and standard deviation.
        missed_flips: presentations whose beginning comes a frame late, or that last a frame too long; the latter are
            "late_flip".
        no_diode: presentations without a photodiode signal, whose onset is then known by flip time.
        breaks: images at which fixation is lost: they and the rest of the trial do not count.
        network_ms, network_tail_ms: mean of one way, and of a rare tail (2 % of messages).
        lost_messages, repeated_messages: requests or replies that get lost, and requests that come once more, later.
        lost_packets: messages of the acquisition that get lost.
        late_packets_ms: how much later than usual they come at times.
        compute_ms: what the sources' work takes.
        slow_every, slow_ms: batches for which it takes longer.
        clock_step_every, clock_step_ms: steps of the display's clock, alternately forward and back.
        client_restart_every: the rig's program crashes in the middle of a batch and is started again.
        acquisition_restart_every: the acquisition program is started again, and its clock and numbers from 0.
        silence_every, silence_s: the rig's program hangs, without a sign of life.
        server_crashes: requests at which the server is killed, before or after they took effect; it is started again
            two seconds later.
        gain_drift: how much the neurons' gain changes over a day, as a share.
    """

    on_ms: float = 100.0
    off_ms: float = 100.0
    trial_images: int = 8
    pause_ms: float = 500.0
    refresh_hz: float = 120.0
    display_ppm: float = 20.0
    acquisition_ppm: float = -35.0
    light_ms: float = 5.0
    light_jitter_ms: float = 0.2
    missed_flips: float = 0.0
    no_diode: float = 0.0
    breaks: float = 0.0
    network_ms: float = 0.15
    network_tail_ms: float = 1.0
    lost_messages: float = 0.0
    repeated_messages: float = 0.0
    lost_packets: float = 0.0
    late_packets_ms: float = 0.0
    compute_ms: float = 15.0
    slow_every: int = 0
    slow_ms: float = 0.0
    clock_step_every: int = 0
    clock_step_ms: float = 0.0
    client_restart_every: int = 0
    acquisition_restart_every: int = 0
    silence_every: int = 0
    silence_s: float = 0.0
    server_crashes: float = 0.0
    gain_drift: float = 0.05


DAYS: dict[str, Day] = {
    "good": Day(missed_flips=0.001, breaks=0.01),
    "bad": Day(
        light_jitter_ms=1.0,
        missed_flips=0.03,
        no_diode=0.05,
        breaks=0.08,
        network_ms=0.6,
        network_tail_ms=15.0,
        lost_messages=0.02,
        repeated_messages=0.02,
        lost_packets=0.0003,
        late_packets_ms=15.0,
        slow_every=4,
        slow_ms=900.0,
        clock_step_every=5,
        clock_step_ms=40.0,
        client_restart_every=6,
        acquisition_restart_every=9,
        silence_every=11,
        silence_s=4.0,
        server_crashes=0.004,
        display_ppm=120.0,
        gain_drift=0.3,
    ),
}
"""By name. "good": what a rig in order does; "bad": all that can go wrong, in one day."""
