"""Network addresses: loopback without proxies, the address of a Ray cluster."""
