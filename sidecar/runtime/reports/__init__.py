"""What people and programs ask of an instance's records: one code for the commands and for the admin port.

`parameters` reads what was asked, `usage`, `calls` and `lists` answer it, `formats` writes the answer down. Everything
here reads, opens what it reads for itself, and may be used beside a running instance.
"""
