"""The command line: argv becomes configuration, and errors become one line.

Nowhere else are strings parsed or messages printed. Modules here import click and
nothing that is slow to load: what a subcommand runs is imported when it runs, since
the time from command to accepting clients matters to those who start a server per test.
"""
