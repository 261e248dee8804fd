"""Sources of stimuli for a session: see `cortexloop.realtime.source.Source` for what they have in common."""
