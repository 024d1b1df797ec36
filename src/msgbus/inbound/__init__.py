"""A message's way in, in the order it is walked: runner, lanes, route, settle; breaker watches."""
