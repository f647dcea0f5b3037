int sv_close_range(unsigned int first, unsigned int last);
int sv_clone_sibling(int *pidfd);
int sv_die_with_parent(void);
int sv_no_new_privs(void);
int sv_set_name(const char *name);
