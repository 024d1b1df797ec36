"""A service on real data: the departures of New York's airports in 2013, three groups, a feed, and a table that reconciles."""
