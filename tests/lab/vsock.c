// A guest's program for AF_VSOCK, which busybox doesn't know.
//
//   vsock echo PORT           answer every connection with what comes, until it is closed
//   vsock send CID PORT SIZE  send SIZE bytes, read them back; prints "sent SIZE same"
#include <linux/vm_sockets.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static char buffer[1 << 16];

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int write_all(int fd, const char *data, size_t size)
{
	while (size) {
		ssize_t done = write(fd, data, size);

		if (done <= 0)
			return -1;
		data += done;
		size -= (size_t)done;
	}
	return 0;
}

static char pattern(size_t at)
{
	return (char)(at * 7 + (at >> 8));
}

static int echo(unsigned int port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
	int server = socket(AF_VSOCK, SOCK_STREAM, 0), peer;
	ssize_t got;

	if (server < 0 || bind(server, (struct sockaddr *)&address, sizeof(address)) < 0 ||
	    listen(server, 8) < 0)
		return fail("vsock echo");
	signal(SIGCHLD, SIG_IGN);
	while ((peer = accept(server, NULL, NULL)) >= 0) {
		if (fork() == 0) {
			while ((got = read(peer, buffer, sizeof(buffer))) > 0)
				if (write_all(peer, buffer, (size_t)got) < 0)
					break;
			_exit(got != 0);
		}
		close(peer);
	}
	return fail("vsock echo: accept");
}

// The peer reads while it writes, so that neither side need hold it all.
static int send_all(int peer, size_t size)
{
	for (size_t at = 0; at < size;) {
		size_t part = size - at < sizeof(buffer) ? size - at : sizeof(buffer);

		for (size_t i = 0; i < part; i++)
			buffer[i] = pattern(at + i);
		if (write_all(peer, buffer, part) < 0)
			return fail("vsock send: write");
		at += part;
	}
	return shutdown(peer, SHUT_WR) < 0 ? fail("vsock send: shutdown") : 0;
}

static int send_and_compare(unsigned int cid, unsigned int port, size_t size)
{
	struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
	int peer = socket(AF_VSOCK, SOCK_STREAM, 0);
	size_t at = 0;
	ssize_t got;

	if (peer < 0 || connect(peer, (struct sockaddr *)&address, sizeof(address)) < 0)
		return fail("vsock send: connect");
	if (fork() == 0)
		_exit(send_all(peer, size));
	while ((got = read(peer, buffer, sizeof(buffer))) > 0)
		for (ssize_t i = 0; i < got; i++, at++)
			if (buffer[i] != pattern(at)) {
				printf("byte %zu differs\n", at);
				return 1;
			}
	if (got < 0)
		return fail("vsock send: read");
	printf("sent %zu %s\n", at, at == size ? "same" : "cut");
	return at != size;
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "echo"))
		return echo((unsigned int)atoi(argv[2]));
	if (argc == 5 && !strcmp(argv[1], "send"))
		return send_and_compare((unsigned int)atoi(argv[2]), (unsigned int)atoi(argv[3]),
					(size_t)atol(argv[4]));
	fprintf(stderr, "usage: vsock echo PORT | vsock send CID PORT SIZE\n");
	return 2;
}
