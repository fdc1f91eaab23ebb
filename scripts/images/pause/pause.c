/*
 * The sandbox program of every pod. It holds the pod's namespaces open and, being process 1
 * where a pod shares its process namespace, reaps orphaned children. SIGINT and SIGTERM end
 * it at once, so that removing a pod never waits for it.
 */
#include <errno.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
	sigset_t set;
	int sig;

	/* Signals are taken one by one with sigwait, so no handler can race with anything. */
	sigemptyset(&set);
	sigaddset(&set, SIGINT);
	sigaddset(&set, SIGTERM);
	sigaddset(&set, SIGCHLD);
	if (sigprocmask(SIG_BLOCK, &set, NULL) != 0)
		return 1;

	for (;;) {
		/* Before waiting: a child may have ended before the mask was set. */
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		if (sigwait(&set, &sig) != 0)
			return 2;
		if (sig != SIGCHLD)
			return 0;
	}
}
