"""`make bench`: nbdserve beside qemu-nbd and nbdkit, measured in one run.

How the figures come about, and why so:

- Servers in turn.  A virtual machine's speed drifts by a factor of two within an hour, so a
  figure means something only beside an opponent's figure of the same minutes.  Each round runs
  each case on every server, in an order that rotates, and the ratio is taken within the round;
  what is reported is the median of the rounds' ratios.
- Against the better one.  qemu-nbd runs with --aio=threads and with --aio=io_uring, and without
  the page cache with --aio=native too; in each round the fastest of them is the opponent.
- The same work.  One 1 GiB image with every cluster allocated, read once before; first writes
  and nbdcopy's copy in start from a fresh, empty image each time and do a fixed amount.  The
  file is synced between runs, so no run pays for the disk writes of the one before.
- No flush is timed, but for what a client asks for itself: the figures are of the server, not
  of the disk.
- Where the disk is in the figure after all, with cache=none and with a flush after each write, it
  is measured too: the same job straight on a file, as "device".  A disk that slows down shows
  there; nobody's reads or writes with cache=none can be more.  With flushes it is less of a
  bound: a server that answers many clients by one fdatasync may pass sixteen fdatasyncs at once.
- n writers that each flush after each write are n connections, 1 deep, not one connection n deep:
  fio's flush does not wait for the write before it.  fio's counts must show one for each.

cases.py is the table of what is measured, servers.py of who is; images.py makes the files,
clients.py runs fio and nbdcopy, report.py has the arithmetic and the table.
"""
