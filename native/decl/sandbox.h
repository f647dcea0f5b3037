int sv_close_range(unsigned int first, unsigned int last);
