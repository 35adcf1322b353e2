"""Who learns; never sees a teacher."""
