"""What every part that writes to disk shares: files, sockets in the file system, and what their errors mean."""
