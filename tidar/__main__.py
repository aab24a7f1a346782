"""Entry point of `python -m tidar`."""

from tidar import main

main()
