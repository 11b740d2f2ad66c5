"""``splitfl demo``: three hospitals and a trunk service on this machine, as separate processes over real sockets."""
