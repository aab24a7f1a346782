"""Model versions under traffic: the alias that is followed, and the canary."""
