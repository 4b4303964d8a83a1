"""The road "socket": plain authenticated TCP between two workers, there when nothing better is."""
