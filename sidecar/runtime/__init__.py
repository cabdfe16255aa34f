"""The process as a whole: what is started, in which order, watched, and closed again."""
