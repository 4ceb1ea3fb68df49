"""People rank candidates in a browser on this machine; their ranks become scores."""
