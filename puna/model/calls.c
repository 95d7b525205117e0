/* Makes calls one behind the other by the same threads, so that these are started once for all of them. The functions
   share their loops out among the threads that are there (`omp for`), and end together. */

/* A function sees of the arguments those that it has: so x86-64 passes them. */
typedef struct {
    void (*function)(long, long, long, long, long, long, long, long, long, long, long, long);
    long with[12];
} Call;

void run(const Call *calls, long count, int threads) {
#pragma omp parallel num_threads(threads)
    for (long i = 0; i < count; i++) {
        const long *with = calls[i].with;
        calls[i].function(with[0], with[1], with[2], with[3], with[4], with[5], with[6], with[7], with[8], with[9],
                          with[10], with[11]);
    }
}
