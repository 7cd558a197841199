"""`make study`: the papers' claims on small data, with every run an ordinary run directory that can be continued."""
