"""What stands between a session and a rig: bytes and messages, transports, clients, configuration, a simulated rig.

May import: `realtime` and what it stands on, pyzmq, msgspec, Pillow.
"""
